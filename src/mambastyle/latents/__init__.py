"""Spaces and directions of StyleGAN2 latents; no network inside."""
