"""The sparse autoencoder, and how each architecture selects its active latents."""
