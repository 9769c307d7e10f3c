"""Samplers: every one is a table of coefficients, and one loop runs them all."""
