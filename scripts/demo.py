"""`make demo`: quantize the demo model in two ways, compare each result with the original, and let the last one talk.

Its codes are also written as a .gguf file, for llama.cpp.

The model is SmolLM2-135M-Instruct. The calibration text is Python's docstrings (`pydoc`). The evaluation text is
Python's language reference (`pytopics`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import llmq
from llmq.calibration.texts import evaluation_chunks, read_text
from llmq.cli import run
from llmq.core.errors import WorkError
from llmq.runtime.evaluation import evaluate, logits_of, remembered, score
from llmq.runtime.load import load_any

METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class DemoConfig:
    """Quantize the demo model with RTN and with GPTQ, and compare both with the original."""

    output: Path = Path("demo-out")
    """Directory for the checkpoints; old ones in it are replaced."""
    bits: int = 4
    """Bits per weight."""
    samples: int = 24
    """Number of calibration sequences, 512 tokens each."""
    chunks: int = 4
    """Number of evaluation chunks, 1024 tokens each."""


def demo(config: DemoConfig) -> None:
    """Run the README's commands, then print one table."""
    print("SmolLM2-135M-Instruct: loading and evaluating the original")
    model, tokenizer = load_any("demo", "cpu")
    chunks = evaluation_chunks(tokenizer, read_text("pytopics"), 1024, config.chunks)
    original = remembered(logits_of(model), chunks)
    del model
    table = [f"{'':<10} {'perplexity':>11} {'KL to original':>15}"]
    table += [f"{'original':<10} {score(original, chunks).perplexity:>11.3f}"]
    outputs = [config.output / f"{method}-{config.bits}bit" for method in METHODS]
    for method, output in zip(METHODS, outputs, strict=True):
        shutil.rmtree(output, ignore_errors=True)
        _quantize(method, output, config)
        result = evaluate(llmq.load(output), chunks, original)
        table.append(f"{method:<10} {result.perplexity:>11.3f} {result.kl:>15.4f}")
    print(f"\n{config.bits} bit, measured on {config.chunks} chunks of 1024 tokens of pytopics:")
    print("\n".join(table) + "\n")
    _llmq("generate", "--model", str(outputs[-1]), "--prompt", "Name the capital of France.")
    for_llama = config.output / "gguf"
    _llmq("convert", str(outputs[-1]), "--format", "gguf", "--output", str(for_llama), "--overwrite")
    print(f"\nThe same codes for llama.cpp. To chat: llama-cli -m {next(for_llama.glob('*.gguf'))}")


def _quantize(method: str, output: Path, config: DemoConfig) -> None:
    calibration = ["--calibration", "pydoc", "--samples", str(config.samples), "--sequence-length", "512"]
    grid = ["--bits", str(config.bits), "--group-size", "64"]
    _llmq("quantize", "--model", "demo", "--method", method, *grid, *calibration, "--output", str(output))


def _llmq(command: str, *arguments: str) -> None:
    print("\n$ python -m llmq." + " ".join([command, *arguments]), flush=True)
    if subprocess.run([sys.executable, "-m", f"llmq.{command}", *arguments]).returncode:
        raise WorkError(f"llmq.{command} failed")


if __name__ == "__main__":
    run(DemoConfig, demo)
