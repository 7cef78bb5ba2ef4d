"""Whole runs that are small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmq


def run(model: Path, text: Path, output: Path, **options: Any) -> Path:
    """Quantize a tiny model with just enough text for two micro-batches to be held out."""
    defaults = {"calibration": str(text), "samples": 20, "sequence_length": 32, "group_size": 32}
    return llmq.quantize(llmq.QuantizeConfig(model=str(model), output=output, **(defaults | options)))
