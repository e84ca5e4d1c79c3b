"""Device profiles: what the target can do, and what this machine is."""
