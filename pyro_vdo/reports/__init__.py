"""What ArviZ and matplotlib are given."""
