"""Sparse probing on labelled texts."""
