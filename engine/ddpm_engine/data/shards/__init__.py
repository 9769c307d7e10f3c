"""Indexed sets of shards: manifest, index and reader."""
