"""Running a recipe: the chain with its stage cache, resume, run directory, goals and report data."""
