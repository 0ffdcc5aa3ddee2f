"""The audit: what stands out in one SAE."""
