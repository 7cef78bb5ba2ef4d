"""Causal attention in bfloat16 on a CPU, in 0.5 to 0.8 of the time of torch's own.

torch's kernel multiplies small blocks without the CPU's bfloat16 instructions. Here a strip of queries is one product
for several heads, and sees only the keys up to its end:

    keys ──►
    ◣░░░░   strip 0    ░ not computed
    ██◣░░   strip 1    ◣ the only square of a strip that needs a mask
    ████◣   strip 2

As in torch's kernel, scores and sums are float32, and probabilities are rounded to bfloat16. So are they for the
gradients, which are computed in the same strips.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
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
def causal_in_strips(device: torch.device, factors: torch.dtype) -> Generator[None]:
    """Let models compute `scaled_dot_product_attention` in strips inside, wherever this gives the same.

    Nothing changes unless the device is a CPU and `factors`, the dtype of matmuls, is bfloat16. The function is
    replaced in its module, where models look it up. A TorchFunctionMode would see every other call of torch too, and
    cost a third of what is saved.
    """
    if device.type != "cpu" or factors != torch.bfloat16:
        yield
        return
    usual = functional.scaled_dot_product_attention
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not _is_plain(given):
            return usual(*args, **kwargs)
        Q, K, V = (given[name].bfloat16() for name in names[:3])
        if torch.is_grad_enabled():
            return _WithGradients.apply(Q, K, V, given.get("scale"))
        return causal_attention(Q, K, V, given.get("scale"))

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _is_plain(given: dict[str, Any]) -> bool:
    """Return whether tokens attend to all tokens before them and nothing else is asked, given torch's arguments."""
    query, key, value = shapes = [given[name].shape for name in ("query", "key", "value")]
    if any(len(shape) != 4 for shape in shapes):
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
    factor: float = Q.shape[3] ** -0.5 if scale is None else scale
    outputs = _empty(Q, V.shape[3])
    into, scores = _by_keys(outputs, K), _room(Q, K)
    with torch.autocast("cpu", enabled=False), bfloat16_products():
        for some in _heads_together(Q, K):
            # The ones sum the probabilities as they are after rounding, to divide by that sum instead of 1.
            values = functional.pad(V[some].float(), (0, 1), value=1.0)
            keys, o = K[some].float(), into[some]
            for strip, P, _ in _probabilities(_by_keys(Q, K)[some], keys, scores, factor):
                sums = torch.bmm(P, values[:, : strip.stop]).view(*o[:, :, strip].shape[:3], -1)
                torch.div(sums[..., :-1], sums[..., -1:], out=o[:, :, strip])
    return outputs


class _WithGradients(torch.autograd.Function):
    """`causal_attention` for a training. Probabilities are computed again for the gradients: nothing large is kept."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, scale: float | None) -> Tensor:
        outputs = causal_attention(Q, K, V, scale)
        ctx.save_for_backward(Q, K, V, outputs)
        ctx.scale = scale
        return outputs

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *causal_gradients(gradients[0], ctx.saved_tensors, ctx.scale), None


def causal_gradients(
    dO: BFloat16[Tensor, "batch heads tokens out"], saved: Sequence[Tensor], scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of Q, K, V. `saved`: Q, K, V and the outputs O of `causal_attention`.

    With S = scale Q Kᵀ and P = softmax(S):  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)),  dQ = scale dS K,
    dK = scale dSᵀ Q. As in torch's kernel, P and dS are rounded to bfloat16 before they are multiplied.
    """
    Q, K, V, O = saved  # noqa: E741 its usual name
    factor: float = Q.shape[3] ** -0.5 if scale is None else scale
    dQ, dK, dV = _empty(Q, Q.shape[3]), torch.zeros(K.shape), torch.zeros(V.shape)
    into, scores, room = _by_keys(dQ, K), _room(Q, K), _room(Q, K)
    with torch.autocast("cpu", enabled=False), bfloat16_products():
        for some in _heads_together(Q, K):
            keys, values, dk, dv = K[some].float(), V[some].float(), dK[some], dV[some]
            of_outputs, o, dq = _by_keys(dO, K)[some], _by_keys(O, K)[some], into[some]
            for strip, P, queries in _probabilities(_by_keys(Q, K)[some], keys, scores, factor):
                seen, (n, shared) = slice(strip.stop), o.shape[:2]
                do = of_outputs[:, :, strip].float()
                along = (do * o[:, :, strip]).sum(-1).view(n, -1, 1)
                do = do.reshape(n, -1, do.shape[-1])
                dv[:, seen].baddbmm_(P.transpose(1, 2), do)
                dS = torch.bmm(do, values[:, seen].transpose(1, 2), out=room[: P.numel()].view(P.shape))
                dS.sub_(along).mul_(P)
                dk[:, seen].baddbmm_(dS.transpose(1, 2), queries, alpha=factor)
                dq[:, :, strip] = torch.bmm(dS, keys[:, seen]).mul_(factor).view(n, shared, -1, keys.shape[-1])
    return dQ, dK.bfloat16(), dV.bfloat16()


def _empty(Q: Tensor, width: int) -> Tensor:
    """Return an empty [batch, heads, tokens, width], in the order in which models read it: tokens before heads."""
    batch, heads, tokens, _ = Q.shape
    return torch.empty(batch, tokens, heads, width, dtype=torch.bfloat16).transpose(1, 2)


def _by_keys(queries: Tensor, K: Tensor) -> Tensor:
    """Return queries or outputs as [batch, kv_heads, shared, tokens, width]."""
    return queries.unflatten(1, (K.shape[1], -1))


def _together(Q: Tensor, K: Tensor) -> int:
    """Return how many heads of keys are computed together."""
    shared, tokens = Q.shape[1] // K.shape[1], Q.shape[2]
    return min(K.shape[1], max(1, _SCORES // (4 * shared * min(_STRIP, tokens) * tokens)))


def _room(Q: Tensor, K: Tensor) -> Tensor:
    """Return room for the scores of a strip."""
    return torch.empty(_together(Q, K) * Q.shape[1] // K.shape[1] * min(_STRIP, Q.shape[2]) * Q.shape[2])


def _heads_together(Q: Tensor, K: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the sequence and the heads of keys that are computed together."""
    together = _together(Q, K)
    return product(range(len(Q)), (slice(h, h + together) for h in range(0, K.shape[1], together)))


def _probabilities(Q: Tensor, K: Tensor, scores: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each strip of tokens, its probabilities [n, shared * rows, stop], and its queries. n: heads of keys."""
    n, shared, tokens, width = Q.shape
    after = torch.full((_STRIP, _STRIP), -inf).triu(1)
    for start in range(0, tokens, _STRIP):
        strip = slice(start, min(start + _STRIP, tokens))
        rows = strip.stop - start
        S = scores[: n * shared * rows * strip.stop].view(n, shared * rows, strip.stop)
        queries = Q[:, :, strip].reshape(n, shared * rows, width).float()
        torch.baddbmm(S, queries, K[:, : strip.stop].transpose(1, 2), beta=0, alpha=scale, out=S)
        S.view(n, shared, rows, strip.stop)[..., start:].add_(after[:rows, :rows])
        yield strip, torch.softmax(S, -1, out=S), queries
