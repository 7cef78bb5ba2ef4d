"""Quantization-aware training: a packed checkpoint learns from a text or from conversations.

request.py opens the model and the data ─► trainer.py trains ─► road.py writes what was learned, checked
"""
