"""Built-in architectures, and the loading of models, weights and user code."""
