"""The prior: a network that generates vectors, such as image embeddings, from text."""
