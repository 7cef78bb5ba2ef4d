"""python -m llmq.eval: perplexity of a model on a text, and its KL divergence from a reference model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from llmq.calibration.texts import check_context, evaluation_chunks, read_text
from llmq.cli import run
from llmq.core.errors import RequestError
from llmq.runtime.evaluation import evaluate, logits_of
from llmq.runtime.load import load_any


@dataclass(frozen=True)
class EvalConfig:
    """Perplexity in the standard way: non-overlapping chunks of one long text, no padding, every chunk on its own."""

    model: str
    """A packed checkpoint, or an original model (directory, hub id, .gguf file or `demo`)."""
    reference: str | None = None
    """Also print the mean KL divergence from this model's predictions, usually the original."""
    text: str = "wikitext2"
    """wikitext2, c4, pile (downloaded), pydoc, pytopics (offline), or a .txt/.jsonl/.parquet file."""
    sequence_length: int = 2048
    """Tokens per chunk."""
    limit: int | None = None
    """Stop after this many chunks."""
    device: str = "auto"
    """auto (cuda when present), cpu or cuda."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""
    json: bool = False
    """Print one JSON object and nothing else on stdout."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2 or (self.limit is not None and self.limit < 1):
            raise RequestError("sequence length must be at least 2 and limit at least 1")


def evaluate_command(config: EvalConfig) -> None:
    """Evaluate and print."""
    # Some data sets are far larger than any limit asks for.
    enough = {} if config.limit is None else {"enough_characters": 12 * config.limit * config.sequence_length}
    text = read_text(config.text, evaluation=True, **enough)
    model, tokenizer = load_any(config.model, config.device, config.trust_remote_code)
    check_context(model.config, config.sequence_length)
    chunks = evaluation_chunks(tokenizer, text, config.sequence_length, config.limit)
    reference = None
    if config.reference is not None:
        original, its_tokenizer = load_any(config.reference, config.device, config.trust_remote_code)
        theirs = evaluation_chunks(its_tokenizer, text, config.sequence_length, 1)
        if not torch.equal(theirs, chunks[:1]) or original.config.vocab_size != model.config.vocab_size:
            raise RequestError(f"{config.reference} and {config.model} have different vocabularies: no KL between them")
        reference = logits_of(original)
    result = evaluate(model, chunks, reference, progress=True)
    if config.json:
        figures = {"perplexity": result.perplexity, "kl": result.kl}
        # JSON knows no infinity: a model that is that broken has no figure.
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}
        about = {"model": config.model, "text": config.text, "chunks": len(chunks), "tokens": result.tokens}
        print(json.dumps(about | finite))
    else:
        print(f"perplexity {result.perplexity:.4f}   ({len(chunks)} chunks of {config.sequence_length} tokens)")
        if result.kl is not None:
            print(f"KL to {config.reference} {result.kl:.5f} nats per token")


def main() -> None:
    """Entry point; the flags are the fields of EvalConfig."""
    run(EvalConfig, evaluate_command)


if __name__ == "__main__":
    main()
