"""Splitting: one concept over several latents."""
