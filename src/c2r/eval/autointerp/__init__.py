"""Automatic interpretability: a judge explains latents and is scored."""
