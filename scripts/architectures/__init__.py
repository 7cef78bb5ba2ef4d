"""The parts of scripts/check_architectures.py."""
