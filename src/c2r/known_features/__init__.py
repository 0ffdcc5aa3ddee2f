"""Activations made of known features, on which absorption and splitting can be counted."""
