"""What can be packed into shards: one module per kind of source."""
