"""Evaluations run by SAEBench."""
