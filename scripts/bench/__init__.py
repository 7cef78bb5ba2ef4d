"""Modules of scripts/gpu_round.py: the plan, the steps, the measurements, and the tables of results."""
