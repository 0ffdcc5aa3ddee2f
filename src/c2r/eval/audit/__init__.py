"""The audit: a description of one SAE in plain words."""
