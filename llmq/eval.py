"""python -m llmq.eval: print the perplexity of a model on a text, and its KL divergence from a reference model."""

import json
import math
from functools import partial

from llmq.cli import run
from llmq.runtime.evaluation import EvalConfig, evaluate_on_text


def evaluate_command(config: EvalConfig) -> None:
    """Evaluate the model and print the figures."""
    result, chunks = evaluate_on_text(config)
    if config.json:
        figures = {"perplexity": result.perplexity, "kl": result.kl}
        # JSON has no infinity: a broken model has no figure.
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}
        request = {"model": config.model, "text": config.text, "chunks": chunks, "tokens": result.tokens}
        request |= {"bos": config.bos}
        print(json.dumps(request | finite))
        return
    cut = "" if config.bos else ", BOS at the start of the text only"
    print(f"perplexity {result.perplexity:.4f}   ({chunks} chunks of {config.sequence_length} tokens{cut})")
    if result.kl is not None:
        print(f"KL to {config.reference} {result.kl:.5f} nats per token")


main = partial(run, EvalConfig, evaluate_command)

if __name__ == "__main__":
    main()
