"""Makes sets of shards, from images or from shards made elsewhere."""
