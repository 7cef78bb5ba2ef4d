"""Packed checkpoints on disk: read, written, and what lies beside the weights."""
