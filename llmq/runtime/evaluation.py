"""How good a model is: perplexity of a text, and KL divergence from the model it was made of."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import nll_loss
from tqdm import tqdm

# Positions scored at a time: a slice of logits of this many tokens by 128k words is 128 MB in float32.
_POSITIONS = 256
_LARGEST_EXPONENT = math.log(sys.float_info.max)

Logits = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Sums over a text, and the figures made of them."""

    nll: float
    """Sum of negative log likelihoods, in nats."""
    tokens: int
    """Predicted tokens: L - 1 of every chunk of L."""
    kl_sum: float | None = None
    """Sum over the same positions of KL(reference || model), in nats."""

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where a broken model exceeds what a float holds."""
        mean = self.nll / self.tokens
        return math.inf if mean > _LARGEST_EXPONENT else math.exp(mean)

    @property
    def kl(self) -> float | None:
        """Mean KL divergence per token."""
        return None if self.kl_sum is None else self.kl_sum / self.tokens


def evaluate(
    model: Any, chunks: Int64[Tensor, "chunks length"], reference: Logits | None = None, progress: bool = False
) -> Evaluation:
    """`score` of a model's own predictions."""
    return score(logits_of(model), chunks, reference, progress)


@torch.no_grad()
def score(
    logits: Logits, chunks: Int64[Tensor, "chunks length"], reference: Logits | None = None, progress: bool = False
) -> Evaluation:
    """Perplexity in the standard way: non-overlapping chunks, each token predicted from those before it in its chunk.

    Args:
        reference: gives the logits [length, vocabulary] of the reference model for chunk i (see `logits_of`).
        progress: show a progress bar with the running perplexity on stderr.
    """
    nll = kl = 0.0
    bar = tqdm(chunks, "evaluating", disable=not progress, unit="chunk")
    for i, chunk in enumerate(bar):
        predicted = logits(i, chunk)
        expected = None if reference is None else reference(i, chunk)
        for at in range(0, len(chunk) - 1, _POSITIONS):
            stop = min(at + _POSITIONS, len(chunk) - 1)
            p = predicted[at:stop].float().log_softmax(-1)
            nll += float(nll_loss(p, chunk[at + 1 : stop + 1].to(p.device), reduction="sum"))
            if expected is not None:
                q = expected[at:stop].to(p.device).float().log_softmax(-1)
                # A word the reference rules out (-inf) adds nothing; one that only the model rules out adds infinity.
                kl += float(torch.where(q.isneginf(), 0.0, q.exp() * (q - p)).sum())
        so_far = Evaluation(nll, (i + 1) * (len(chunk) - 1))
        bar.set_postfix_str(f"perplexity {so_far.perplexity:.3f}", refresh=False)
    return Evaluation(nll, chunks.shape[0] * (chunks.shape[1] - 1), None if reference is None else kl)


def logits_of(model: Any) -> Logits:
    """The function from (index, chunk) to the model's logits [length, vocabulary]."""

    def logits(_: int, chunk: Int64[Tensor, "length"]) -> Float[Tensor, "length vocabulary"]:
        return model(input_ids=chunk[None].to(model.device), use_cache=False).logits[0]

    return logits


def remembered(logits: Logits, chunks: Iterable[Tensor]) -> Logits:
    """The same logits computed once and kept, for comparing many models with one reference."""
    with torch.no_grad():
        kept = [logits(i, chunk).cpu() for i, chunk in enumerate(chunks)]
    return lambda i, _: kept[i]
