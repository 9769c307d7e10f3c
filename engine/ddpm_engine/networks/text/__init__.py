"""Text encoders, frozen: from captions to embeddings of their tokens."""
