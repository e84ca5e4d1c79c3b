"""Predictors of an architecture's quality from numbers that describe it, learned from few trained architectures."""
