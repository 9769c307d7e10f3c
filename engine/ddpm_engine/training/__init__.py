"""Training: the loop, its strategies and its state."""
