"""Diffusion on text that is written as the pixels of an image, a token a pixel."""
