"""One table: perplexity, KL, time and memory of methods x bits x symmetric/asymmetric on one model.

Every row is a run of `python -m llmq.quantize` in its own process (so that its memory is its own), whose checkpoint is
then loaded and evaluated. Rows are written as they finish; a second call with the same --results goes on where it was.

    python scripts/compare_methods.py --model demo-dithered --calibration valid.txt --text test.txt --limit 20
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import llmq
from llmq.cli import run
from llmq.data import evaluation_chunks, read_text
from llmq.errors import RequestError, WorkError
from llmq.evaluate import Logits, evaluate, logits_of, remembered, score
from llmq.load import load_any
from llmq.writer import REPORT


@dataclass(frozen=True)
class CompareConfig:
    """Quantize one model in many ways and compare the results with it."""

    model: str
    """Directory, hub id, .gguf file or demo."""
    calibration: str = "pydoc"
    """Text to calibrate on."""
    text: str = "pytopics"
    """Text to evaluate on; should share nothing with the calibration text."""
    methods: tuple[str, ...] = ("rtn", "gptq", "awq")
    bits: tuple[int, ...] = (4, 3, 2)
    grids: tuple[str, ...] = ("symmetric", "asymmetric")
    group_size: int = 64
    samples: int = 64
    sequence_length: int = 512
    """Tokens per calibration sequence."""
    chunk: int = 2048
    """Tokens per evaluation chunk."""
    limit: int | None = 20
    """Evaluation chunks."""
    results: Path = Path("compare_methods.jsonl")
    """Finished rows, one JSON object each."""


def compare(config: CompareConfig) -> None:
    """Do the missing rows, then print the table in Markdown."""
    rows = _finished(config)
    model, tokenizer = load_any(config.model, "cpu")
    chunks = evaluation_chunks(tokenizer, read_text(config.text, evaluation=True), config.chunk, config.limit)
    reference = remembered(logits_of(model), chunks)
    del model
    original = score(reference, chunks).perplexity
    for key in product(config.bits, config.grids, config.methods):
        if key not in rows:
            rows[key] = _row(config, key, chunks, reference)
            with config.results.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
            print(_line(rows[key]), file=sys.stderr, flush=True)
    print("\n".join(_table(config, original, rows)))


def _row(config: CompareConfig, key: tuple[int, str, str], chunks: torch.Tensor, reference: Logits) -> dict[str, Any]:
    bits, grid, method = key
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "model"
        command = [sys.executable, "-m", "llmq.quantize", "--model", config.model, "--output", str(output)]
        command += ["--method", method, "--bits", str(bits), "--group-size", str(config.group_size)]
        command += ["--symmetric"] if grid == "symmetric" else ["--no-symmetric"]
        command += ["--format", "compressed-tensors", "--calibration", config.calibration]
        command += ["--samples", str(config.samples), "--sequence-length", str(config.sequence_length)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise WorkError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        report = json.loads((output / REPORT).read_text())
        result = evaluate(llmq.load(output, device="cpu"), chunks, reference)
    row = {
        "settings": _settings(config),
        "bits": bits,
        "grid": grid,
        "method": method,
        "perplexity": result.perplexity,
        "kl": result.kl,
    }
    return row | {"seconds": report["seconds"], "peak_memory_bytes": report["peak_memory_bytes"]}


def _finished(config: CompareConfig) -> dict[tuple[int, str, str], dict[str, Any]]:
    """Rows of earlier calls. Raises RequestError if they were made with other settings."""
    lines = config.results.read_text().splitlines() if config.results.exists() else []
    rows = [json.loads(line) for line in lines]
    if any(row["settings"] != _settings(config) for row in rows):
        raise RequestError(f"{config.results} holds rows made with other settings; name another file with --results")
    return {(row["bits"], row["grid"], row["method"]): row for row in rows}


def _settings(config: CompareConfig) -> dict[str, Any]:
    """What all rows of one table have in common."""
    common = ("group_size", "samples", "sequence_length", "chunk", "limit")
    files = {name: Path(getattr(config, name)).name for name in ("model", "calibration", "text")}
    return files | {name: getattr(config, name) for name in common}


def _table(config: CompareConfig, original: float, rows: dict[tuple[int, str, str], dict[str, Any]]) -> Iterator[str]:
    tokens = f"{config.samples}x{config.sequence_length}"
    yield f"group {config.group_size}, {tokens} tokens; original perplexity {original:.3f}"
    yield "| bits | grid | method | perplexity | KL | seconds | forward + statistics | peak memory |"
    yield "|---|---|---|---|---|---|---|---|"
    for key in product(config.bits, config.grids, config.methods):
        yield _line(rows[key])


def _line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    counted = sum(seconds.get(phase, 0.0) for phase in ("forward", "statistics", "solve", "write"))
    share = (seconds.get("forward", 0.0) + seconds.get("statistics", 0.0)) / counted
    return (
        f"| {row['bits']} | {row['grid']} | {row['method']} | {row['perplexity']:.3f} | {row['kl']:.4f} "
        f"| {seconds['total']:.0f} | {share:.0%} | {row['peak_memory_bytes'] / 1e9:.2f} GB |"
    )


if __name__ == "__main__":
    run(CompareConfig, compare)
