"""Shards under a URL: fetched, verified and cached on a local disk."""
