"""Modules of scripts/bench_kernels.py: the plan, the measurements, and the table of results."""
