"""What ``fit`` is made of."""
