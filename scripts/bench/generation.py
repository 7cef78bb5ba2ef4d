"""Time what a user gets: llmq.load on a packed model of LLaMA-7B's shape, then generate, and the same in 16 bit."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import models
from bench.session import Session, Task

_TIMES = 2
LOOPS = (("packed", "generate"), ("merged", "fast"), ("merged", "generate"), ("dense", "fast"), ("dense", "generate"))
"""(model, loop). merged: with q, k, v and gate, up as one matmul each. fast: llmq.fast_generate."""


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task for each model and loop. A packed model is merged after its last use unmerged."""
    for what, loop in LOOPS:
        yield Task("generate", (what, loop), partial(_measure, session, what, loop), seconds=15)
    yield Task("generate", None, lambda: _forget(session), seconds=0)


def _forget(session: Session) -> None:
    session.cache.pop("loaded", None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def _measure(session: Session, what: str, loop: str) -> dict[str, Any]:
    sizes, where = session.plan.generation, session.machine.where
    model, loading = _model(session, what)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    numbers = torch.randint(1, session.plan.decoder.vocabulary, (1, sizes.prompt), generator=torch.Generator())
    ids = numbers.to(where)
    run = {"fast": _fast, "generate": _plain}[loop]
    started = time.perf_counter()
    run(session, model, ids)  # compiles
    first = time.perf_counter() - started
    runs = [run(session, model, ids) for _ in range(_TIMES)]
    if runs[0]["ids"] != runs[1]["ids"]:
        raise RuntimeError("two greedy runs gave different tokens")
    if runs[0].get("plain"):
        session.notes.append(f"{what}: fast_generate did not prepare its steps: {runs[0]['plain']}")
    best = max(runs, key=lambda row: row["tokens_per_second"])
    best |= loading | {"first_seconds": round(first, 2), "twice": [row["tokens_per_second"] for row in runs]}
    if where.type == "cuda":
        best["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    return best


def _plain(session: Session, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Time transformers' generate: the prompt and one token, then all."""
    new = session.plan.generation.new

    def run(tokens: int) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        session.machine.synchronize()
        return time.perf_counter() - started, output

    prefill, _ = run(1)
    whole, output = run(new)
    return _row(new, prefill, whole - prefill, output)


def _fast(session: Session, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    import llmq

    done = llmq.fast_generate(model, ids, max_new_tokens=session.plan.generation.new, do_sample=False)
    timing = done.timing
    row = _row(timing.new_tokens, timing.prefill_seconds, timing.decode_seconds, done.sequences)
    return row | {"capture_seconds": round(timing.capture_seconds, 3), "plain": done.plain}


def _row(new: int, prefill: float, decode: float, output: torch.Tensor) -> dict[str, Any]:
    # The first token comes out of the prompt.
    speed = round((new - 1) / max(decode, 1e-9), 2)
    return {"tokens_per_second": speed, "prefill_seconds": round(prefill, 4), "new": new, "ids": output[0].tolist()}


def _model(session: Session, what: str) -> tuple[Any, dict[str, Any]]:
    """Return the model and how long it took to load. One model is kept, for the next task."""
    kept = session.cache.get("loaded", {})
    if what not in kept:
        _merge_or_drop(session, what)
    return session.cache["loaded"][what]


def _merge_or_drop(session: Session, what: str) -> None:
    from llmq.runtime.fused_siblings import merge_linears

    kept = session.cache.get("loaded", {})
    dtype, where = getattr(torch, session.plan.dtype), session.machine.where
    if what == "dense":
        _forget(session)
        session.cache["loaded"] = {"dense": (models.dense(session.plan.decoder, dtype, where), {})}
        return
    model, loading = kept.get("packed") or _load(session, dtype)
    if what == "merged":
        merge_linears(model)
    session.cache["loaded"] = {what: (model, loading)}


def _load(session: Session, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    import llmq

    _forget(session)
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "packed", time.perf_counter()
        models.write_packed(path, session.plan.decoder, session.plan.group, dtype, session.machine.where)
        session.say(f"wrote a packed model in {time.perf_counter() - started:.1f}s")
        started = time.perf_counter()
        model = llmq.load(path, session.machine.where.type, dtype)
        session.machine.synchronize()
    return model, {"load_seconds": round(time.perf_counter() - started, 2)}
