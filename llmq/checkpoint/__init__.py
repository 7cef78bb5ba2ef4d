"""Packed checkpoints on disk: read them, write them, and copy the files beside the weights."""
