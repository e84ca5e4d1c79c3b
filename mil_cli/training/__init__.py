"""The training loop, its settings, and evaluation."""
