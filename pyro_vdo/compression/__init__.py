"""From masks to smaller networks, and their files."""
