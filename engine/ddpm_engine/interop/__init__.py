"""Readers for other libraries' checkpoints. Nothing that is read is executed."""
