"""The autoencoder and how each family selects its activations."""
