"""What models are for: inputs, losses, metrics, and distances between outputs."""
