"""Strategies: how a step is spread over processes."""
