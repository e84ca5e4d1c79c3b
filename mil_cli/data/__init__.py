"""Data sets, and how batches are made of them."""
