"""What maps do with undrawn weights, besides the linear ones of ``local_reparam``."""
