"""Absorption: latents that should fire and whose children fire instead."""
