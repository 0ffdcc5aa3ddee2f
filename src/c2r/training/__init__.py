"""Training: the step, the loop around it, its folder and its checkpoints."""
