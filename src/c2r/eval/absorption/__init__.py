"""Absorption: latents that should fire but do not, because more specific latents fire instead."""
