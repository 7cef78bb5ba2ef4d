"""Compare llmq with mlx_lm.convert in MLX's format: a table of KL and perplexity at equal sizes.

mlx_lm.convert rounds to nearest. Every row is evaluated in float32 in transformers: with the linears of the blocks that
a quantizer made, and all else as in the original. Scales and biases are float16.

    .venv-peers/bin/python scripts/compare_mlx.py --calibration wikitext2-valid.txt --text wikitext2-test.txt
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_methods import CompareConfig, Row, common, finished, rows_of
from dither import DitherConfig, write_dithered
from torch import nn
from tqdm import tqdm

from llmq.calibration.texts import evaluation_chunks, read_text
from llmq.cli import run
from llmq.formats import mlx
from llmq.formats.scheme import Scheme
from llmq.models.model_source import ModelSource
from llmq.runtime.evaluation import evaluate, logits_of, remembered, score

_OURS = ("llmq gptq: --format mlx --no-symmetric",)
_THEIRS = "mlx_lm.convert"


@dataclass(frozen=True)
class CompareMlxConfig:
    """Quantize one model with llmq and with mlx_lm, and compare the results with the original."""

    calibration: str
    """Text to calibrate on."""
    text: str
    """Text to evaluate on; it should share nothing with the calibration text."""
    model: Path = Path("demo-dithered")
    """Directory of the model; the dithered demo model (see dither.py) is made if it is missing."""
    bits: tuple[int, ...] = (4, 3, 2)
    """Bits per weight."""
    group_size: int = 64
    """Weights that share a scale and a bias."""
    samples: int = 64
    """Calibration sequences."""
    sequence_length: int = 512
    """Tokens per calibration sequence."""
    chunk: int = 2048
    """Tokens per evaluation chunk."""
    limit: int = 20
    """Number of evaluation chunks."""
    results: Path = Path("docs/benchmarks/mlx.jsonl")
    """File of finished rows, one JSON object per line. Only missing rows are measured."""


def compare(config: CompareMlxConfig) -> None:
    """Measure the missing rows, then print the table in Markdown."""
    if not config.model.exists():
        write_dithered(DitherConfig(config.model))
    names = ("bits", "samples", "sequence_length", "chunk", "limit", "results")
    same = {name: getattr(config, name) for name in names} | {"settings": _OURS, "group_sizes": (config.group_size,)}
    shared = CompareConfig(str(config.model), config.calibration, config.text, **same)
    rows = [*_rows_of_mlx(shared), *rows_of(shared)]
    print(*_table(sorted(rows, key=lambda row: (-row["bits"], -row["kl"]))), sep="\n")


def _rows_of_mlx(config: CompareConfig) -> list[Row]:
    """Return the rows of mlx_lm. Rows that --results lacks are measured and added to it."""
    rows = finished(config, {})
    keys = [(_THEIRS, bits, config.group_sizes[0], 0) for bits in config.bits]
    if missing := [key for key in keys if key not in rows]:
        source = ModelSource(config.model)
        model = source.load_all(torch.device("cpu"), torch.float32)
        chunks = evaluation_chunks(
            source.tokenizer, read_text(config.text, evaluation=True), config.chunk, config.limit
        )
        reference = remembered(logits_of(model), chunks)
        original = score(reference, chunks).perplexity
        for key in tqdm(missing, "mlx_lm", unit="row"):
            name, bits, size, seed = key
            sizes = put_mlx(model, Path(config.model), Scheme(bits, size, False))
            result = evaluate(model, chunks, reference)
            row = {"settings": common(config), "name": name, "flags": "", "bits": bits, "group_size": size}
            row |= {"seed": seed, "bits_per_weight": sizes, "perplexity": result.perplexity, "kl": result.kl}
            rows[key] = row | {"original_perplexity": original}
            with config.results.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
    return [rows[key] for key in keys]


@torch.no_grad()
def put_mlx(model: Any, directory: Path, scheme: Scheme) -> float:
    """Overwrite the linears of a model with what mlx_lm makes of its files; return the bits per weight."""
    mx, trees, utils = (importlib.import_module(name) for name in ("mlx.core", "mlx.utils", "mlx_lm.utils"))
    linears = {n: m for n, m in model.base_model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    theirs, settings = utils.load_model(directory)
    theirs.set_dtype(mx.float16)
    utils.quantize_model(theirs, settings, scheme.group_size, scheme.bits)
    stored = dict[str, Any](trees.tree_flatten(theirs.parameters()))
    nbytes = 0
    for name, linear in linears.items():
        parts = {f"{name}.{part}": torch.tensor(stored[f"{name}.{part}"]) for part in mlx.TENSOR_SUFFIXES}
        linear.weight.copy_(mlx.decode(name, parts, scheme).dequantize())
        nbytes += sum(part.nbytes for part in parts.values())
    return 8 * nbytes / sum(linear.weight.numel() for linear in linears.values())


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield f"original perplexity {rows[0]['original_perplexity']:.3f}\n"
    yield "| bits | by | bits per weight | KL | perplexity |"
    yield "|---|---|---|---|---|"
    for row in rows:
        sizes = f"{row['bits']} | {row['name']} | {row['bits_per_weight']:.2f}"
        yield f"| {sizes} | {row['kl']:.4f} | {row['perplexity']:.3f} |"


if __name__ == "__main__":
    run(CompareMlxConfig, compare)
