"""Recipes: Hydra composes a user's file with the shipped groups, pydantic validates the result once."""
