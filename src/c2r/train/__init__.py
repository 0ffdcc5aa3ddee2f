"""Training: one SAE, a run of several, logs."""
