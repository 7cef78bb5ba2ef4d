"""Time llmq.quantize on the first blocks of a random model of LLaMA-7B's shape, on random words."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import models
from bench.session import Session, Task

_SPARE = 1.05  # words of the text beyond those that the samples need


def tasks(session: Session) -> Iterator[Task]:
    """Yield one task that quantizes with GPTQ, effort normal."""
    q = session.plan.quantizing
    yield Task("quantize", (q.blocks, q.samples, q.length), lambda: _quantize(session), seconds=30)


def _quantize(session: Session) -> dict[str, Any]:
    import llmq

    plan, where = session.plan, session.machine.where
    q, dtype = plan.quantizing, getattr(torch, plan.dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.write_dense(folder / "model", plan.decoder, q.blocks, dtype, where)
        models.write_text(folder / "text.txt", plan.decoder, int(_SPARE * q.samples * q.length))
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the steps before took some
        config = llmq.QuantizeConfig(
            model=str(folder / "model"),
            output=folder / "packed",
            calibration=str(folder / "text.txt"),
            samples=q.samples,
            sequence_length=q.length,
            group_size=plan.group,
            device=where.type,
        )
        llmq.quantize(config)
        report = json.loads((folder / "packed" / "llmq_report.json").read_text(encoding="utf-8"))
    return _summary(report)


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of each block, of each phase, and what was done otherwise than asked."""
    ends: dict[str, float] = {}
    for group in report["groups"]:
        ends[group["block"]] = group["at"]
    at = list(ends.values())
    blocks = [after - before for before, after in pairwise(at)]  # the first one also opens the run
    return {
        "block_seconds": round(min(blocks), 2),
        "blocks": [round(seconds, 2) for seconds in blocks],
        "phases": {name: round(seconds, 1) for name, seconds in report["seconds"].items()},
        "host_peak_bytes": report["peak_memory_bytes"],
        "gpu_peak_bytes": report.get("gpu_peak_bytes"),
        "errors": [round(group["error"], 5) for group in report["groups"]],
        "notes": report["notes"][:5],
    }
