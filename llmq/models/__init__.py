"""Weights in: from what the user typed to the blocks of a model."""
