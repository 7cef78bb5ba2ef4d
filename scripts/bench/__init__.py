"""The parts of scripts/bench_kernels.py: what is measured, how, and the table."""
