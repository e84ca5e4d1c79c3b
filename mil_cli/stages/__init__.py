"""The four families of methods, and training: one file per method, found through the registry."""
