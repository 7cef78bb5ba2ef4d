"""Check that a checkpoint on disk holds the computed tensors, and that it runs."""
