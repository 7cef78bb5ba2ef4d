"""Whole runs that are small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmq


def small_config(model: Path, text: Path, output: Path, **options: Any) -> llmq.QuantizeConfig:
    """Return the request for a tiny model with just enough text for two micro-batches to be held out."""
    defaults = {"calibration": str(text), "samples": 20, "sequence_length": 32, "group_size": 32}
    return llmq.QuantizeConfig(model=str(model), output=output, **(defaults | options))


def run(model: Path, text: Path, output: Path, **options: Any) -> Path:
    """Quantize a tiny model as `small_config` asks for it."""
    return llmq.quantize(small_config(model, text, output, **options))
