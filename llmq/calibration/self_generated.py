"""Calibration text that the model writes itself, for when there is no text to calibrate on (`--calibration self`).

Every sequence starts with BOS (or, without one, with a random token) and is sampled token by token. The first tokens
decide what a text is about, so they are drawn at a higher temperature that falls to 1, the model's own distribution:
without it most sequences begin alike. (LLM-QAT, Liu et al., arXiv 2305.17888, samples its training text likewise.)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llmq.core.settings import Calibration

SELF = "self"
"""The name of this text among calibration texts."""
_HOTTEST, _HOT_TOKENS = 2.0, 16
_CACHE_BYTES = {"cpu": 512_000_000, "cuda": 8_000_000_000}  # keys and values of the sequences written at a time


class _Draw(LogitsProcessor):
    """Draws the next token, and rules out all others.

    At a temperature that falls from _HOTTEST to 1 over the first _HOT_TOKENS tokens. One random number a token decides,
    where the sampling of `generate` takes one for each word: a third of its time on a CPU.
    """

    def __call__(
        self, input_ids: Int64[Tensor, "batch length"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        rest = max(0.0, 1 - (input_ids.shape[1] - 1) / _HOT_TOKENS)
        below = (scores.float() / (1 + (_HOTTEST - 1) * rest)).softmax(-1).cumsum(-1)
        at = torch.rand(len(scores), 1).to(scores.device) * below[:, -1:]
        # From the right: never a word of probability 0.
        drawn = torch.searchsorted(below, at, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@torch.no_grad()
def sample_sequences(
    model: Any, bos: int | None, settings: Calibration, progress: bool = False
) -> Int64[Tensor, "samples length"]:
    """`samples` sequences of `sequence_length` tokens, the same for the same seed.

    Args:
        bos: the token that texts begin with, if there is one.
        progress: show a progress bar on stderr.
    """
    config = model.config.get_text_config()
    vocabulary, length = config.vocab_size, settings.sequence_length
    model.generation_config = GenerationConfig()  # how the model is meant to be sampled is not how it speaks
    # Nothing ends a sequence: what follows an end-of-text token is the next text, as in windows of a corpus.
    how = GenerationConfig(do_sample=False, max_new_tokens=length - 1, pad_token_id=0)
    written = []
    with torch.random.fork_rng(devices=[]):  # all random numbers are drawn on the CPU
        torch.manual_seed(settings.seed)
        shape = (settings.samples, 1)
        starts = torch.randint(vocabulary, shape) if bos is None else torch.full(shape, bos)
        size = length * _cache_bytes_per_token(config, model.dtype)
        batches = starts.split(max(1, _CACHE_BYTES[model.device.type] // size))
        for start in tqdm(batches, "writing calibration text", disable=not progress, unit="batch"):
            draw = LogitsProcessorList([_Draw()])
            sequences = model.generate(start.to(model.device), generation_config=how, logits_processor=draw)
            written.append(sequences.cpu())
    return torch.cat(written)


def _cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * dtype.itemsize * config.num_hidden_layers * heads * size
