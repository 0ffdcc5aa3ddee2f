"""Hand-over to SAEBench."""
