"""Measure the perplexity of a checkpoint that plain transformers loads, to check the result of `python -m llmq.eval`.

Here llmq only cuts the text and sums the likelihoods. The package of the checkpoint's format unpacks the weights.

    python scripts/eval_perplexity.py --model demo-4bit --text test.txt --limit 20
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq.calibration.texts import evaluation_chunks, read_text
from llmq.cli import run
from llmq.core.device import pick_device
from llmq.core.errors import RequestError
from llmq.runtime.evaluation import evaluate


@dataclass(frozen=True)
class PerplexityConfig:
    """Cut one long text into chunks that do not overlap, and predict each token from the earlier ones in its chunk."""

    model: str
    """A directory or hub id that transformers can open."""
    text: str = "wikitext2"
    """wikitext2, c4 or pile (downloaded); pydoc or pytopics (offline); or a .txt, .jsonl or .parquet file."""
    sequence_length: int = 2048
    """Tokens per chunk."""
    limit: int | None = None
    """Stop after this many chunks."""
    device: str = "auto"
    """auto (cuda if there is a GPU), cpu or cuda."""


def eval_perplexity(config: PerplexityConfig) -> None:
    """Load the model with transformers, evaluate it, and print its perplexity. Raises RequestError if loading fails."""
    device = pick_device(config.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32 if device.type == "cpu" else "auto"
        )
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"transformers cannot open {config.model}: {str(error).splitlines()[0]}") from None
    text = read_text(config.text, evaluation=True)
    chunks = evaluation_chunks(tokenizer, text, config.sequence_length, config.limit)
    result = evaluate(model.to(device).eval(), chunks, progress=True)
    print(f"perplexity {result.perplexity:.4f}   ({len(chunks)} chunks of {config.sequence_length} tokens)")


if __name__ == "__main__":
    run(PerplexityConfig, eval_perplexity)
