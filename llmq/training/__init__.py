"""Training for `algorithms/tuned.py` and `run/end_to_end.py`: weights that learn, the loop, the loss."""
