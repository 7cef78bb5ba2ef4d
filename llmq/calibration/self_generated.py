"""Calibration text that the model writes itself, if there is no text to calibrate on (`--calibration self`).

Every sequence starts with BOS, or with a random token if the tokenizer has no BOS, and is sampled token by token. The
first tokens decide the topic of a text. So they are drawn at a higher temperature, which falls to 1, the model's own
distribution. Without that, most sequences begin alike. (LLM-QAT, Liu et al., arXiv 2305.17888, trains on such text.)
Sequences can also go on from given beginnings: the text is then like the one that these are from.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llmq.calibration.block_runner import Compute
from llmq.calibration.texts import check_tokens
from llmq.core.memory import release_memory
from llmq.core.settings import Calibration
from llmq.models.model_source import ModelSource

SELF = "self"  # the name of this text for `--calibration`
_HOTTEST, _HOT_TOKENS = 2.0, 16
_CACHE_BYTES = {"cpu": 512_000_000, "cuda": 8_000_000_000}  # for keys and values of one batch of sequences


class _Draw(LogitsProcessor):
    """Draws the next token, and rules out all others, so that greedy decoding takes it.

    The temperature falls from _HOTTEST to 1 over the first _HOT_TOKENS tokens. One random number decides a token. The
    sampling of `generate` draws one for each word of the vocabulary, which takes a third of its time on a CPU.

    `min_p`: a token is not drawn if its probability is less than this share of the largest one (Nguyen et al., arXiv
    2407.01082). It grows from 0 while the temperature falls.
    """

    def __init__(self, min_p: float = 0.0) -> None:
        self._min_p = min_p

    def __call__(
        self, input_ids: Int64[Tensor, "batch length"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        heat = max(0.0, 1 - (input_ids.shape[1] - 1) / _HOT_TOKENS)
        probabilities = (scores.float() / (1 + (_HOTTEST - 1) * heat)).softmax(-1)
        if least := self._min_p * (1 - heat):
            probabilities *= probabilities >= least * probabilities.amax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn(probabilities), 0.0)


def drawn(probabilities: Float[Tensor, "batch vocabulary"]) -> Int64[Tensor, "batch 1"]:
    """Draw a token for each row. Their sum need not be 1. The random numbers are drawn on the CPU."""
    cumulative = probabilities.cumsum(-1)
    threshold = torch.rand(len(cumulative), 1).to(cumulative.device) * cumulative[:, -1:]
    # right=True: a word of probability 0 is never drawn.
    return torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)


def sequences_by(
    source: ModelSource,
    settings: Calibration,
    compute: Compute,
    progress: bool = False,
    starts: Int64[Tensor, "samples start"] | None = None,
    min_p: float = 0.0,
) -> Int64[Tensor, "samples length"]:
    """Return sequences that an original model writes, in the precision of its matmuls. It is freed afterwards."""
    model = source.load_all(compute.device, compute.precision).requires_grad_(False)
    if starts is not None:
        check_tokens(model, starts)
    written = sample_sequences(model, source.tokenizer.bos_token_id, settings, progress, starts, min_p)
    del model
    release_memory()
    return written


@torch.no_grad()
def sample_sequences(
    model: Any,
    bos: int | None,
    settings: Calibration,
    progress: bool = False,
    starts: Int64[Tensor, "samples start"] | None = None,
    min_p: float = 0.0,
) -> Int64[Tensor, "samples length"]:
    """Let the model write texts that begin with the token `bos`, if not None. A seed always gives the same texts.

    `starts`: what the texts begin with instead; fewer tokens than a text has. `min_p`: see _Draw.
    """
    config, length = model.config.get_text_config(), settings.sequence_length
    model.generation_config = GenerationConfig()  # its own sampling defaults would change the distribution
    written = []
    with torch.random.fork_rng(devices=[]):  # random numbers are drawn on the CPU alone
        torch.manual_seed(settings.seed)
        shape = (settings.samples, 1)
        if starts is None:
            starts = torch.randint(config.vocab_size, shape) if bos is None else torch.full(shape, bos)
        # No token ends a sequence: after an end-of-text token comes the next text, as in windows of a corpus.
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=length - starts.shape[1], pad_token_id=0, **_cache_settings(model)
        )
        size = length * _cache_bytes_per_token(config, model.dtype)
        batches = starts.split(max(1, _CACHE_BYTES[model.device.type] // size))
        for start in tqdm(batches, "writing calibration text", disable=not progress, unit="batch"):
            draw = LogitsProcessorList([_Draw(min_p)])
            sequences = model.generate(start.to(model.device), generation_config=greedy, logits_processor=draw)
            written.append(sequences.cpu())
    return torch.cat(written)


def _cache_settings(model: Any) -> dict[str, Any]:
    """Return the settings of `generate` for a cache that has its full size from the start, if the model can use one.

    The usual one is copied for each token. Beside that, transformers 5.23 reads keys and values once for all heads that
    share them only if there is a mask, which such a cache needs: 331 instead of 249 tokens/s for 34 texts of 200 tokens
    (135M weights, 2 cores with AVX-512 BF16, 2026-11-30).
    """
    return {"cache_implementation": "static", "disable_compile": True} if can_use_static_cache(model) else {}


def can_use_static_cache(model: Any) -> bool:
    """Return whether a model of transformers can keep keys and values in a cache of fixed size."""
    # ALiBi's biases have the length of the text so far, not that of the cache.
    alibi = getattr(model.config.get_text_config(), "alibi", False)
    return getattr(model, "_can_compile_fullgraph", False) and not alibi


def _cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    all_heads = getattr(config, "num_attention_heads", None) or 1  # a model without attention keeps less, not more
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    return 2 * dtype.itemsize * config.num_hidden_layers * heads * size
