"""Zero-cost scores: what an architecture shows before it is trained, on one batch; one file a score."""
