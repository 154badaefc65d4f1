"""The generative reward model."""
