"""Frozen autoencoders, whose latents a diffusion process can be of."""
