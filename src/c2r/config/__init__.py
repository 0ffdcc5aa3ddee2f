"""What a run's YAML may say: frozen, checked before any work. Nothing here imports torch."""
