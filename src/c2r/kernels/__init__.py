"""Sparse products and searches on tensors; depends only on PyTorch."""
