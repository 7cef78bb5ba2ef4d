"""What the tests of the checkpoint formats share: golden weights, round trips, damaged tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from packed import assert_same_weight
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats.scheme import Scheme

NAME = "model.layers.0.mlp.up_proj"
LAYERS = [
    f"model.layers.{i}.{part}" for i in range(12) for part in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj")
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUP = 16


def golden_weight(bits: int, rows: int = 16, columns: int = 32) -> QuantizedWeight:
    """Codes, zero points and scales that other libraries packed to the integers in the tests."""
    o, i, g = torch.arange(rows)[:, None], torch.arange(columns), torch.arange(columns // GROUP)
    q = (7 * o + 3 * i + (o * i) % 5) % 2**bits
    zero = 1 + (o + 5 * g) % (2**bits - 1)
    scale = (1 + ((o + g) % 4) / 4) / 16
    return QuantizedWeight(q.to(torch.uint8), scale.half(), zero.to(torch.uint8), bits)


def sha(words: Tensor) -> str:
    """The first 16 hex digits of SHA-256 over the little-endian words."""
    return hashlib.sha256(words.numpy().astype("<i4").tobytes()).hexdigest()[:16]


def check_round_trip(form: Any, weight: QuantizedWeight, written: Scheme, read: Scheme | None = None) -> None:
    """`decode` gives back what `encode` was given, which is not changed by it."""
    before = [None if part is None else part.clone() for part in (weight.q, weight.scale, weight.zero, weight.group_of)]
    tensors = form.encode(NAME, weight, written)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    q, scale, zero, group_of = before
    assert_same_weight(weight, QuantizedWeight(q, scale, zero, weight.bits, group_of))
    assert_same_weight(form.decode(NAME, tensors, read or written), weight)


def check_refused(form: Any, tensors: Mapping[str, Tensor], scheme: Scheme, reason: str | None = None) -> None:
    """`decode` refuses these tensors and names the linear."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        form.decode(NAME, tensors, scheme)
    assert str(caught.value).startswith(NAME)
    assert len(str(caught.value).splitlines()) == 1


def check_missing_parts(form: Any, tensors: Mapping[str, Tensor], scheme: Scheme) -> None:
    """`decode` names each of these tensors when it is missing."""
    for missing in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != missing}
        check_refused(form, rest, scheme, f"{missing} is missing")


def _with(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.clone().index_fill_(1, torch.tensor([1]), value)


# name -> (part, change), for formats that call them qweight, qzeros and scales
DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "codes as int64": ("qweight", lambda t: t.long()),
    "codes as bytes": ("qweight", lambda t: t.view(torch.uint8)),
    "codes as floats": ("qweight", lambda t: t.float()),
    "codes flat": ("qweight", lambda t: t.flatten()),
    "codes of three dimensions": ("qweight", lambda t: t[None]),
    "codes without rows": ("qweight", lambda t: t[:0]),
    "codes without columns": ("qweight", lambda t: t[:, :0]),
    "codes a row short": ("qweight", lambda t: t[:-1]),
    "codes a column short": ("qweight", lambda t: t[:, :-1]),
    "codes transposed": ("qweight", lambda t: t.T),
    "zeros as floats": ("qzeros", lambda t: t.float()),
    "zeros as int64": ("qzeros", lambda t: t.long()),
    "zeros flat": ("qzeros", lambda t: t.flatten()),
    "zeros a group short": ("qzeros", lambda t: t[:-1]),
    "zeros a group too many": ("qzeros", lambda t: torch.cat([t, t[:1]])),
    "zeros a word short": ("qzeros", lambda t: t[:, :-1]),
    "zeros transposed": ("qzeros", lambda t: t.T),
    "scales as integers": ("scales", lambda t: t.int()),
    "scales as float64": ("scales", lambda t: t.double()),
    "scales flat": ("scales", lambda t: t.flatten()),
    "scales with half of the groups": ("scales", lambda t: t[::2]),
    "scales a column short": ("scales", lambda t: t[:, :-1]),
    "scales transposed": ("scales", lambda t: t.T),
    "scales with a NaN": ("scales", _with(float("nan"))),
    "scales with an infinity": ("scales", _with(float("-inf"))),
}


def damaged(tensors: Mapping[str, Tensor], case: str) -> dict[str, Tensor]:
    """These tensors with one of them damaged."""
    part, change = DAMAGE[case]
    return {**tensors, f"{NAME}.{part}": change(tensors[f"{NAME}.{part}"])}
