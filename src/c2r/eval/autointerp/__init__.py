"""Automatic interpretability: a language model explains latents, and its explanations are scored."""
