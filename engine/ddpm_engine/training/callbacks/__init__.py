"""What happens besides stepping, one callback a module."""
