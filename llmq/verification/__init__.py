"""Is a checkpoint what was computed, and does it run?"""
