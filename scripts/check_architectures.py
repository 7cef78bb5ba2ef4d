"""Quantize a tiny model of every decoder that transformers knows, and see what works.

    python scripts/check_architectures.py
    python scripts/check_architectures.py --only llama qwen3_5_text
    python scripts/check_architectures.py --report

Each model is random, has every kind of layer of its architecture, and sides that are as divisible as those of real
models (scripts/architectures/sizes.py). It is quantized by rtn and gptq, to 4 bits in groups of 32. Then llmq and stock
transformers load the result. Both must give the logits of the dense model that holds the dequantized weights, and llmq
must generate the same tokens.

Each model has a process of its own, so a crash ends nothing else. Models that are in --results already are not run
again: after a change to llmq, remove that file. All of them take 630 CPU seconds (2-core AVX2 machine, 2026-11-28).
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import RLock
from typing import Any

import transformers
from architectures import report
from architectures.check import checked
from architectures.tiny_models import names
from bench import pool
from tqdm import tqdm

from llmq.cli import run
from llmq.core.errors import RequestError

Row = dict[str, Any]


@dataclass(frozen=True)
class ArchitecturesConfig:
    """Check what llmq does with every decoder that transformers knows; write docs/architectures.md."""

    results: Path = Path("docs/benchmarks/architectures.jsonl")
    """Finished checks, one JSON object each. The run goes on from there."""
    only: tuple[str, ...] = ()
    """Check these only, even if they are in --results; print, but write no report. --list shows the names."""
    list: bool = False
    """Print the names and do nothing else. Most are model types; what follows an @ is a variant."""
    report: bool = False
    """Only write the report from --results."""
    output: Path = Path("docs/architectures.md")
    """The report."""
    readme: Path | None = None
    """A file with the two comments that enclose the table of well-known models, such as README.md; it is rewritten."""
    seconds: float = 90
    """How long one model may take."""


def check(config: ArchitecturesConfig) -> None:
    """Check what is not in the results yet, print the table and write the report."""
    if config.list:
        print(*names(), sep="\n")
        return
    if unknown := set(config.only) - set(names()):
        raise RequestError(f"unknown names: {', '.join(sorted(unknown))}; --list shows all")
    lines = config.results.read_text().splitlines() if config.results.exists() else []
    rows: dict[str, Row] = {row["name"]: row for row in map(json.loads, lines)}
    wanted = [] if config.report else config.only or [name for name in names() if name not in rows]
    for name in (bar := tqdm(wanted, unit="model", disable=None)):
        bar.set_description(name)
        rows[name] = row = _row(name, config.seconds)
        with config.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if config.only:
        print(*report.table([rows[name] for name in config.only]), sep="\n")
        return
    ordered = [rows[name] for name in names() if name in rows]
    print(*report.totals(ordered), *report.table(ordered), sep="\n")
    config.output.write_text(report.page(ordered))
    if config.readme is not None:
        config.readme.write_text(report.with_families(config.readme.read_text(), ordered))


def _row(name: str, seconds: float) -> Row:
    """Check one model in a process of its own."""
    ((_, row),) = pool.run(_work, [name], 1, seconds, preloaded=["architectures.check"])
    if isinstance(row, Exception):
        words = f"no result after {seconds:.0f} s" if isinstance(row, TimeoutError) else f"{type(row).__name__}: {row}"
        row = {"name": name, "class": "", "experts": None, "share": None, "remark": "", "result": f"crash: {words}"}
    return row | {"date": str(date.today()), "transformers": transformers.__version__}


def _work(name: str) -> Row:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    tqdm.set_lock(RLock())  # its own would outlive the process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars of other libraries
    with tempfile.TemporaryDirectory(prefix="architecture-") as room:
        return checked(name, Path(room))


if __name__ == "__main__":
    run(ArchitecturesConfig, check)
