"""The diffusion transformer, DiT, and what later work made standard."""
