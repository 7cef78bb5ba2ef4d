"""Causal attention in bfloat16 on a CPU, in 0.5 to 0.8 of the time of torch's own.

torch's kernel multiplies small blocks without the CPU's bfloat16 instructions. Here a strip of queries is one product
for several heads, and sees only the keys up to its end:

    keys ──►
    ◣░░░░   strip 0    ░ not computed
    ██◣░░   strip 1    ◣ the only square of a strip that needs a mask
    ████◣   strip 2

As in torch's kernel, scores and sums are float32, and probabilities are rounded to bfloat16.
"""

from collections.abc import Generator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor
from torch.nn import functional

from llmq.core.device import bfloat16_products

# Queries of a strip, and bytes of the scores that are computed together. Milliseconds for 2048 tokens, torch's kernel
# -> these strips, in sequences of 512 and of 2048 tokens (2 cores of an AMD EPYC with AVX512_BF16, torch 2.13,
# 2026-11-29). Of 128 or 256 queries and 1 to 8 MiB none was better for all of these shapes.
#
#     heads, of keys, width     512 tokens     2048 tokens
#        9      3       64       15 ->  9       36 ->  23
#       32      8      128      103 -> 48      242 -> 131
#       32     32      128      107 -> 66      245 -> 192
#       16      8      256      102 -> 48      229 -> 121
_STRIP, _SCORES = 256, 5 << 20


@contextmanager
def causal_in_strips() -> Generator[None]:
    """Let models on a CPU compute `scaled_dot_product_attention` in strips inside, wherever this gives the same.

    The function is replaced in its module, where models look it up. A TorchFunctionMode would see every other call of
    torch too, and cost a third of what is saved.
    """
    usual = functional.scaled_dot_product_attention
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not _is_plain(given):
            return usual(*args, **kwargs)
        Q, K, V = (given[name].bfloat16() for name in names[:3])
        return causal_attention(Q, K, V, given.get("scale"))

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _is_plain(given: dict[str, Any]) -> bool:
    """Return whether tokens attend to all tokens before them and nothing else is asked, given torch's arguments."""
    query, key, value = shapes = [given[name].shape for name in ("query", "key", "value")]
    if torch.is_grad_enabled() or any(len(shape) != 4 for shape in shapes):
        return False
    is_square = query[2] == key[2] and query[0] == key[0] and query[3] == key[3] and key[:3] == value[:3]
    fits = query[1] % key[1] == 0 if given.get("enable_gqa") else query[1] == key[1]
    is_causal = given.get("is_causal", False) and given.get("attn_mask") is None and not given.get("dropout_p")
    return is_square and fits and is_causal


def causal_attention(
    Q: BFloat16[Tensor, "batch heads tokens width"],
    K: BFloat16[Tensor, "batch kv_heads tokens width"],
    V: BFloat16[Tensor, "batch kv_heads tokens out"],
    scale: float | None = None,
) -> BFloat16[Tensor, "batch heads tokens out"]:
    """Return softmax(scale Q Kᵀ) V over the tokens up to each one. `scale`: 1/√width if None.

    Query heads that share the keys of one head are rows of one product.
    """
    (batch, heads, tokens, width), kv_heads, out = Q.shape, K.shape[1], V.shape[3]
    factor: float = width**-0.5 if scale is None else scale
    shared, rows = heads // kv_heads, min(_STRIP, tokens)
    together = min(kv_heads, max(1, _SCORES // (4 * shared * rows * tokens)))
    scores = torch.empty(together * shared * rows * tokens)
    # In the order in which models read it: [batch, tokens, heads, out].
    outputs = torch.empty(batch, tokens, heads, out, dtype=torch.bfloat16).transpose(1, 2)
    queries, into = Q.unflatten(1, (kv_heads, shared)), outputs.unflatten(1, (kv_heads, shared))
    with torch.autocast("cpu", enabled=False), bfloat16_products():
        for b in range(batch):
            for h in range(0, kv_heads, together):
                some = slice(h, h + together)
                # The ones sum the probabilities as they are after rounding, to divide by that sum instead of 1.
                values = functional.pad(V[b, some].float(), (0, 1), value=1.0)
                _attend(queries[b, some], K[b, some].float(), values, into[b, some], scores, factor)
    return outputs


def _attend(Q: Tensor, K: Tensor, values: Tensor, into: Tensor, scores: Tensor, scale: float) -> None:
    """Compute the outputs of some heads into `into` [n, shared, tokens, out]. `scores` is room for those of a strip."""
    n, shared, tokens, width = Q.shape
    after = torch.full((_STRIP, _STRIP), -inf).triu(1)
    for start in range(0, tokens, _STRIP):
        stop = min(start + _STRIP, tokens)
        rows = stop - start
        S = scores[: n * shared * rows * stop].view(n, shared * rows, stop)
        strip = Q[:, :, start:stop].reshape(n, shared * rows, width).float()
        torch.baddbmm(S, strip, K[:, :stop].transpose(1, 2), beta=0, alpha=scale, out=S)
        S.view(n, shared, rows, stop)[..., start:].add_(after[:rows, :rows])
        sums = torch.bmm(torch.softmax(S, -1, out=S), values[:, :stop]).view(n, shared, rows, -1)
        torch.div(sums[..., :-1], sums[..., -1:], out=into[:, :, start:stop])
