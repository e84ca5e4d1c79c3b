"""Search strategies: which architectures to score next under hard bounds, so that a good one is found soon."""
