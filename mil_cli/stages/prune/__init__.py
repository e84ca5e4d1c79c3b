"""Pruning: removing what a model can do without, one method a file."""
