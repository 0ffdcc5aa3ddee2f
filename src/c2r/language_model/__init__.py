"""A Hugging Face causal language model, read at hook points."""
