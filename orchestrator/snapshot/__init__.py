"""A training state in memory, on its way to a checkpoint and back."""
