"""Calibration text in, statistics of each layer's inputs out."""
