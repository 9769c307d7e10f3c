"""Indexed sets of shards: manifest, index, opening, reading, verifying."""
