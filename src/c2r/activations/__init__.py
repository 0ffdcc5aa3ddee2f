"""From rows of token ids to batches of activations; see the README in this folder for the steps."""
