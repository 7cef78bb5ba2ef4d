"""Measures a model: perplexity of a text, and KL divergence from a reference model."""

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

from llmq.calibration.texts import CHARACTERS, check_context, check_text, check_tokens, evaluation_chunks, read_text
from llmq.core.errors import RequestError
from llmq.core.settings import at_revision
from llmq.runtime.load import load_any
from llmq.runtime.rounded_inputs import round_inputs

# Positions scored at a time: a slice of logits of this many tokens by 128k words is 128 MB in float32.
_POSITIONS = 256
_LARGEST_EXPONENT = math.log(sys.float_info.max)

Logits = Callable[[int, Tensor], Tensor]
Chunks = Int64[Tensor, "chunks length"]


@dataclass(frozen=True)
class EvalConfig:
    """Print the perplexity of a model on a text, and with --reference its KL divergence from another model.

    Perplexity is computed in the standard way: the text is cut into chunks that do not overlap, without padding, and
    each chunk is scored alone.
    """

    model: str
    """A packed checkpoint, or an original model (directory, hub id, .gguf file or `demo`)."""
    reference: str | None = None
    """Also print the mean KL divergence from the predictions of this model, usually the original."""
    text: str = "wikitext2"
    """wikitext2, c4 or pile (downloaded); pydoc or pytopics (offline); or a .txt, .jsonl or .parquet file."""
    sequence_length: int = 2048
    """Tokens in a chunk."""
    limit: int | None = None
    """Score at most this many chunks; all if not given."""
    bos: bool = True
    """Begin every chunk with the BOS token, if the tokenizer has one: models such as Gemma need it. --no-bos cuts the
    text as published perplexities do, with BOS at the start of the text only."""
    activations: int = 16
    """8: round what enters the packed layers (of an original model: all linears of its blocks) to 8 bits, token by
    token, as engines with 8-bit matmuls do. Shows what W4A8 or W8A8 costs. 16: as it is."""
    device: str = "auto"
    """auto (cuda if there is a GPU, else cpu), cpu, cuda or cuda:N."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for models you trust."""
    json: bool = False
    """Print one JSON object on stdout, and nothing else."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; org/name@REVISION means the same."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise RequestError(f"--sequence-length must be at least 2; got {self.sequence_length}")
        if self.activations not in (8, 16):
            raise RequestError(f"--activations must be 8 or 16; got {self.activations}")
        if self.limit is not None and self.limit < 1:
            raise RequestError(f"--limit must be at least 1; got {self.limit}")


@dataclass(frozen=True)
class Evaluation:
    """Sums over a text, with their means as properties."""

    nll: float  # sum of negative log likelihoods, in nats
    tokens: int  # predicted tokens: L - 1 of every chunk of L
    kl_sum: float | None = None  # sum over the same positions of KL(reference || model), in nats

    @property
    def perplexity(self) -> float:
        """Return exp(nll / tokens); infinity if a float cannot hold it, as with a broken model."""
        mean = self.nll / self.tokens
        return math.inf if mean > _LARGEST_EXPONENT else math.exp(mean)

    @property
    def kl(self) -> float | None:
        """Return the mean KL divergence per token, or None without a reference."""
        return None if self.kl_sum is None else self.kl_sum / self.tokens


def evaluate_on_text(config: EvalConfig) -> tuple[Evaluation, int]:
    """Load the models and the text, and return (evaluation, number of chunks).

    Raises RequestError if the two models have different vocabularies.
    """
    # Some data sets are far larger than --limit asks for.
    enough = {} if config.limit is None else {"enough_characters": CHARACTERS * config.limit * config.sequence_length}
    check_text(config.text)  # before the model is loaded
    model, tokenizer = load_any(
        at_revision(config.model, config.revision), config.device, config.trust_remote_code, exact=True
    )
    if config.activations == 8:
        round_inputs(model)
    check_context(model.config, config.sequence_length)
    text = read_text(config.text, evaluation=True, tokenizer=tokenizer, **enough)
    chunks = evaluation_chunks(tokenizer, text, config.sequence_length, config.limit, config.bos)
    check_tokens(model, chunks)
    reference = None
    if config.reference is not None:
        original, its_tokenizer = load_any(config.reference, config.device, config.trust_remote_code, exact=True)
        first = evaluation_chunks(its_tokenizer, text, config.sequence_length, 1, config.bos)
        if not torch.equal(first, chunks[:1]) or _vocabulary(original) != _vocabulary(model):
            raise RequestError(
                f"{config.reference} and {config.model} have different vocabularies, so there is no KL divergence "
                "between them; choose the original of the model as --reference"
            )
        reference = logits_of(original)
    return evaluate(model, chunks, reference, progress=True), len(chunks)


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def evaluate(model: Any, chunks: Chunks, reference: Logits | None = None, progress: bool = False) -> Evaluation:
    """Score the predictions of a model: see `score`."""
    return score(logits_of(model), chunks, reference, progress)


@torch.no_grad()
def score(logits: Logits, chunks: Chunks, reference: Logits | None = None, progress: bool = False) -> Evaluation:
    """Compute perplexity in the standard way: each token is predicted from the tokens before it in its chunk.

    Args:
        reference: returns the logits [length, vocabulary] of the reference model for chunk i (see `logits_of`).
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
                # A word that the reference rules out (-inf) adds 0; one that only the model rules out adds infinity.
                kl += float(torch.where(q.isneginf(), 0.0, q.exp() * (q - p)).sum())
        so_far = Evaluation(nll, (i + 1) * (len(chunk) - 1))
        bar.set_postfix_str(f"perplexity {so_far.perplexity:.3f}", refresh=False)
    return Evaluation(nll, chunks.shape[0] * (chunks.shape[1] - 1), None if reference is None else kl)


def logits_of(model: Any) -> Logits:
    """Return the function that computes the model's logits [length, vocabulary] for (index, chunk)."""

    def logits(_: int, chunk: Int64[Tensor, "length"]) -> Float[Tensor, "length vocabulary"]:
        return model(input_ids=chunk[None].to(model.device), use_cache=False).logits[0]

    return logits


def remembered(logits: Logits, chunks: Iterable[Tensor]) -> Logits:
    """Compute all logits once and return a function that looks them up: for many models and one reference."""
    with torch.no_grad():
        kept = [logits(i, chunk).cpu() for i, chunk in enumerate(chunks)]
    return lambda i, _: kept[i]
