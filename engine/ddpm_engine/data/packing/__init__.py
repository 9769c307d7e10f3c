"""Making shards from folders of images and from datasets."""
