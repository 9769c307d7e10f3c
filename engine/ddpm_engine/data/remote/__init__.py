"""Shards that lie elsewhere: fetched, verified and cached."""
