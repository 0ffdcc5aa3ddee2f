"""Training: the optimisation step, the training loop, the output folder and checkpoints."""
