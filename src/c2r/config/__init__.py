"""The configuration of a run: immutable, validated before any work begins. Nothing here imports torch."""
