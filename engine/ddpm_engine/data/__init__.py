"""Training data: WebDataset shards, read in an order that is a pure function."""
