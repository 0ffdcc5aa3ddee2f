"""Sparse products and searches on tensors: PyTorch alone, nothing of SAEs."""
