"""Fast assessment of architectures: cheap scores, and how well they rank."""
