"""Checkpoints: written, verified, loaded and averaged."""
