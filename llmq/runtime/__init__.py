"""Turns a checkpoint into a model that runs."""
