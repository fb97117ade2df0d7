"""Special functions and fused sums behind divergences and samples."""
