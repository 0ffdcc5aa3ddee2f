"""Evaluations and their result files."""
