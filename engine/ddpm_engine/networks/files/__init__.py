"""Files of saved networks, as diffusers writes them: folders, JSON configurations and weights."""
