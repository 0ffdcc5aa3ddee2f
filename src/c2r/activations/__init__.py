"""From rows of token ids to batches of activations; the README beside this file draws the way."""
