"""A checkpoint becomes a model that runs."""
