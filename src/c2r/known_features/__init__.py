"""Synthetic activations made of known features, on which absorption and splitting can be measured exactly."""
