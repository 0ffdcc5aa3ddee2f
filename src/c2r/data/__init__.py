"""Text, token rows, language models, activations."""
