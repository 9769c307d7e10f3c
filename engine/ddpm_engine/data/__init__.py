"""Training data: shards, and the order in which their samples are read."""
