"""Terms of the training objectives."""
