"""mil: shrink trained PyTorch models until they meet the goals their owner wrote down."""

__version__ = "0.1.0"
