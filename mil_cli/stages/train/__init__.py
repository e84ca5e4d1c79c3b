"""Training as a stage."""
