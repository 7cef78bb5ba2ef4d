"""Compare llmq with mlx_lm's own quantizers in MLX's format: a table of KL and perplexity at equal groups.

mlx_lm.convert rounds to nearest, as most MLX models of the hub are made. mlx_lm.quant.gptq is its GPTQ, for 2, 4 and 8
bit; it gets the windows that llmq is calibrated on. Every row is evaluated in float32 in transformers: with the linears
of the blocks that a quantizer made, and all else as in the original. Scales of mlx_lm have the dtype of the model.

    .venv-peers/bin/python scripts/compare_mlx.py --calibration wikitext2-valid.txt --text wikitext2-test.txt
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from compare_methods import CompareConfig, Row, common, finished, rows_of
from dither import DitherConfig, write_dithered
from torch import Tensor, nn
from tqdm import tqdm

from llmq.calibration.texts import evaluation_chunks, read_text, windows
from llmq.cli import run
from llmq.core.settings import Calibration
from llmq.formats import mlx
from llmq.formats.scheme import Scheme
from llmq.models.model_source import ModelSource
from llmq.models.older_config import with_older_rope
from llmq.runtime.evaluation import evaluate, logits_of, remembered, score

_OURS = ("llmq rtn: --method rtn --format mlx --no-symmetric", "llmq gptq: --format mlx --no-symmetric")
_CONVERT, _GPTQ = "mlx_lm.convert", "mlx_lm.quant.gptq"
_GPTQ_BITS = (2, 4, 8)  # it stops at others: "Unsupported bits"


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
    shared = CompareConfig(str(config.model), config.calibration, config.text, results=config.results)
    shared = replace(shared, settings=_OURS, bits=config.bits, group_sizes=(config.group_size,), chunk=config.chunk)
    shared = replace(shared, samples=config.samples, sequence_length=config.sequence_length, limit=config.limit)
    rows = [*_rows_of_mlx(shared), *rows_of(shared)]
    print(*_table(sorted(rows, key=lambda row: (-row["bits"], -row["kl"]))), sep="\n")


def _rows_of_mlx(config: CompareConfig) -> list[Row]:
    """Return the rows of mlx_lm's quantizers. Rows that --results lacks are measured and added to it."""
    rows = finished(config, {_CONVERT: "", _GPTQ: ""})
    keys = [(name, bits, config.group_sizes[0], 0) for bits, name in product(config.bits, (_CONVERT, _GPTQ))]
    keys = [key for key in keys if key[0] == _CONVERT or key[1] in _GPTQ_BITS]
    if missing := [key for key in keys if key not in rows]:
        source = ModelSource(config.model)
        model = source.load_all(torch.device("cpu"), torch.float32)
        chunks = evaluation_chunks(
            source.tokenizer, read_text(config.text, evaluation=True), config.chunk, config.limit
        )
        reference = remembered(logits_of(model), chunks)
        original = score(reference, chunks).perplexity
        sequences = windows(source.tokenizer, Calibration(config.calibration, config.samples, config.sequence_length))
        for key in tqdm(missing, "mlx_lm", unit="row"):
            name, bits, size, seed = key
            sizes = put_mlx(model, Path(config.model), Scheme(bits, size, False), sequences if name == _GPTQ else None)
            result = evaluate(model, chunks, reference)
            row = {"settings": common(config), "name": name, "flags": "", "bits": bits, "group_size": size}
            row |= {"seed": seed, "bits_per_weight": sizes, "perplexity": result.perplexity, "kl": result.kl}
            rows[key] = row | {"original_perplexity": original}
            with config.results.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
    return [rows[key] for key in keys]


@torch.no_grad()
def put_mlx(model: Any, directory: Path, scheme: Scheme, sequences: Tensor | None) -> float:
    """Overwrite the linears of a model with what mlx_lm makes of its files; return the bits per weight.

    `sequences`: to calibrate GPTQ on, [samples, length]; None: round to nearest.
    """
    mx, nn_of_mlx, trees, quant, utils = (
        importlib.import_module(name)
        for name in ("mlx.core", "mlx.nn", "mlx.utils", "mlx_lm.quant.gptq", "mlx_lm.utils")
    )
    linears = {n: m for n, m in model.base_model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    settings = with_older_rope(json.loads((directory / "config.json").read_text()))
    theirs, settings = utils.load_model(directory, model_config=settings)
    bits, size = scheme.bits, scheme.group_size
    if sequences is None:
        only = {"quant_predicate": lambda _, module: isinstance(module, nn_of_mlx.Linear)}
        utils.quantize_model(theirs, settings, size, bits, **only)
    else:
        quant.gptq_quantize(theirs, mx.array(sequences.numpy()), bits, size, fallback_bits=8, fallback_group_size=size)
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
