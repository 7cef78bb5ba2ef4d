"""Tokens per second of the same codes in llmq, llama.cpp and MLX, on one CPU in one run.

    python -m llmq.quantize --model demo --format gguf --output demo-gguf
    python -m llmq.convert demo-gguf --format compressed-tensors --output demo-packed
    python -m llmq.convert demo-packed --format mlx --output demo-mlx
    .venv-peers/bin/python scripts/bench_engines.py --packed demo-packed --gguf demo-gguf --mlx demo-mlx

The engines take turns, so other work on the machine slows all of them. Medians are printed. Each computes as it does by
default; but MLX in float32, because float16 is many times slower on its CPU backend. `make peers` installs what it
needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from llama_cpp import Llama, Speed

import llmq
from llmq.cli import run
from llmq.core.errors import RequestError
from llmq.models.locate import gguf_in
from llmq.runtime.fast_generation import fast_generate
from llmq.runtime.load import open_tokenizer

_PROMPT = "The city stands on a river in the north of the country, and has been a centre of trade for centuries. "


@dataclass(frozen=True)
class BenchEnginesConfig:
    """Measure prefill and decode of the same codes in three engines."""

    packed: Path
    """A packed checkpoint for llmq."""
    gguf: Path
    """The same codes as a .gguf file, or the directory that holds it."""
    mlx: Path
    """The same codes for MLX."""
    prompt_tokens: int = 128
    """Tokens of the prompt."""
    tokens: int = 48
    """New tokens in a run."""
    runs: int = 5
    """Runs of each engine."""
    threads: int = 2
    """Threads of llmq and llama.cpp. MLX chooses its own."""


def bench(config: BenchEnginesConfig) -> None:
    """Print a table. Raises RequestError if a path does not hold what it should."""
    torch.set_num_threads(config.threads)
    tokenizer = open_tokenizer(config.packed, trust_remote_code=False)
    ids = tokenizer(_PROMPT * config.prompt_tokens)["input_ids"][: config.prompt_tokens]
    file = gguf_in(config.gguf)
    if file is None:
        raise RequestError(f"{config.gguf} holds no .gguf file")
    with Llama(file, config.threads) as llama:
        engines: dict[str, Callable[[], Speed]] = {
            "llmq": _in_llmq(config, ids),
            "llama.cpp": lambda: llama.speed(ids, config.tokens),
            "MLX": _in_mlx(config, ids),
        }
        for measure in engines.values():
            measure()
        found: dict[str, list[Speed]] = {name: [] for name in engines}
        for _ in range(config.runs):
            for name, measure in engines.items():
                found[name].append(measure())
    print(f"{config.prompt_tokens} tokens of prompt, {config.tokens} new ones, {config.threads} threads, tokens/s\n")
    print("| engine | prefill | decode |\n|---|---|---|")
    for name, speeds in found.items():
        print(f"| {name} | {median(s.prefill for s in speeds):.1f} | {median(s.decode for s in speeds):.1f} |")


def _in_llmq(config: BenchEnginesConfig, ids: list[int]) -> Callable[[], Speed]:
    model, prompt = llmq.load(config.packed, "cpu", merge=True), torch.tensor([ids])

    def measure() -> Speed:
        options = {"do_sample": False, "max_new_tokens": config.tokens, "min_new_tokens": config.tokens}
        timing = fast_generate(model, prompt, **options).timing
        return Speed(timing.prompt_tokens / timing.prefill_seconds, timing.decode_rate)

    return measure


def _in_mlx(config: BenchEnginesConfig, ids: list[int]) -> Callable[[], Speed]:
    # Only the environment of `make interop` has it.
    mx, mlx_lm, utils = (importlib.import_module(name) for name in ("mlx.core", "mlx_lm", "mlx_lm.utils"))
    model, _ = utils.load_model(config.mlx)
    model.set_dtype(mx.float32)
    tokenizer = utils.load_tokenizer(config.mlx)

    def measure() -> Speed:
        *_, last = mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=config.tokens)
        return Speed(last.prompt_tps, last.generation_tps)

    return measure


if __name__ == "__main__":
    run(BenchEnginesConfig, bench)
