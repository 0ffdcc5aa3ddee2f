"""What ships with the package: the embedded language model and the demo's configuration."""
