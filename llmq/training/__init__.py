"""What `algorithms/tuned.py` and `run/end_to_end.py` share: weights that learn, the loop, the loss."""
