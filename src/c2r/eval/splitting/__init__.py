"""Splitting: one concept is represented by several latents."""
