"""GGUF: the blocks in which llama.cpp, and what is built on it, stores the weights of one linear.

NAME.blocks   uint8 [out, bytes]   blocks of consecutive inputs; bits and symmetry give their type

type  number  bits  weights  block                                              weight
Q4_0     2     4      32     float16 d, 16 bytes of codes i and i+16            d * (code - 8)
Q4_1     3     4      32     float16 d, float16 m, 16 bytes of codes            d * code + m
Q8_0     8     8      32     float16 d, 32 int8                                 d * int8
Q2_0    42     2      64     float16 d, 16 bytes of four codes, lowest first    d * (code - 1)

llmq's symmetric 2-bit codes stand for -2..1 steps, those of Q2_0 for -1..2: codes are complemented (3 - q), scales
negated. A scale may be negative in all four. Scales must be numbers of float16; in Q4_1, so must scale * zero.

The numbers of the types are those of ggml.h in llama.cpp v0.4.0. tests/interop compares the decoded weights with those
that llama.cpp computes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats.scheme import Scheme, Schemes, checked, part_of, zero_codes

METHOD = "gguf"


@dataclass(frozen=True)
class BlockType:
    """A type of blocks: its number in a file, and what a block holds."""

    number: int
    bits: int
    symmetric: bool
    weights: int  # in a block
    head: int  # bytes before the codes

    @property
    def nbytes(self) -> int:
        """Return the bytes of a block."""
        return self.head + self.weights * self.bits // 8


TYPES = {
    "Q4_0": BlockType(2, 4, True, 32, 2),
    "Q4_1": BlockType(3, 4, False, 32, 4),
    "Q8_0": BlockType(8, 8, True, 32, 2),
    "Q2_0": BlockType(42, 2, True, 64, 2),
}
TENSOR_SUFFIXES = ("blocks",)


def type_for(bits: int, symmetric: bool, group_size: int, name: str = "gguf") -> str:
    """Return the name of the type that stores such weights. Raises CheckpointError with what would fit."""
    fitting = [key for key, kind in TYPES.items() if (kind.bits, kind.symmetric) == (bits, symmetric)]
    if not fitting:
        kind = "symmetric" if symmetric else "asymmetric"
        known = "2, 4 and 8 bit symmetric, 4 bit asymmetric"
        raise CheckpointError(f"{name}: no block type of GGUF has {bits}-bit {kind} codes; those of llmq are {known}")
    block = TYPES[fitting[0]].weights
    if group_size != -1 and group_size % block:
        rule = f"a block of {fitting[0]} holds {block} weights"
        raise CheckpointError(f"{name}: {rule}, so groups of {group_size} do not fit; use --group-size {block}")
    return fitting[0]


def encode(name: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the blocks of one linear. A larger group becomes several blocks with the same scale.

    Raises CheckpointError for what no block can store.
    """
    kind_name = type_for(weight.bits, scheme.symmetric, scheme.group_size, name)
    kind = TYPES[kind_name]
    if weight.group_of is not None or weight.group_size % kind.weights:
        raise CheckpointError(f"{name}: a block of {kind_name} holds {kind.weights} consecutive inputs of one group")
    repeats = weight.group_size // kind.weights
    scale, zero = (each.repeat_interleave(repeats, dim=1) for each in (weight.scale, zero_codes(name, weight)))
    codes = weight.q.unflatten(1, (-1, kind.weights))
    parts = [_float16(name, -scale if kind_name == "Q2_0" else scale, "a scale")]
    if kind_name == "Q4_1":
        parts.append(_float16(name, -(scale.double() * zero), "scale * zero"))
    head = torch.stack(parts, dim=-1).view(torch.uint8)
    return {f"{name}.blocks": torch.cat([head, _packed(codes, kind_name)], dim=-1).flatten(1)}


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that `encode` wrote, in groups of one block. Raises CheckpointError for damaged tensors."""
    kind_name = type_for(scheme.bits, scheme.symmetric, scheme.group_size, name)
    kind, stored = TYPES[kind_name], part_of(name, tensors, "blocks")
    if stored.dtype != torch.uint8 or stored.ndim != 2 or not stored.numel() or stored.shape[1] % kind.nbytes:
        found = f"{stored.dtype} {tuple(stored.shape)}"
        raise CheckpointError(f"{name}: expected rows of {kind_name} blocks of {kind.nbytes} bytes, found {found}")
    blocks = stored.unflatten(1, (-1, kind.nbytes))
    head = blocks[..., : kind.head].contiguous().view(torch.float16)
    scale = -head[..., 0] if kind_name == "Q2_0" else head[..., 0].contiguous()
    zero = torch.full(scale.shape, 2 ** (kind.bits - 1), dtype=torch.uint8, device=stored.device)
    if kind_name == "Q4_1":
        zero = _zeros(name, scale, head[..., 1])
    codes = _unpacked(blocks[..., kind.head :], kind_name).flatten(1)
    return checked(name, QuantizedWeight(codes, scale, zero, kind.bits), scheme)


def hf_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:  # noqa: ARG001 the types of tensors tell
    """Return what a reader of the blocks must know: the type of each linear. It is not written to a file."""
    kinds = {name: type_for(s.bits, s.symmetric, s.group_size, name) for name, s in schemes.items()}
    return {"quant_method": METHOD, "types": kinds}


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each packed linear. Raises CheckpointError for a type that llmq does not read."""
    kinds: Mapping[str, str] = config.get("types", {})
    unknown = [name for name in names if kinds.get(name) not in TYPES]
    if unknown:
        raise CheckpointError(f"{unknown[0]}: type {kinds.get(unknown[0])} is not one of {', '.join(TYPES)}")
    found = {name: TYPES[kinds[name]] for name in names}
    return {name: Scheme(kind.bits, kind.weights, kind.symmetric) for name, kind in found.items()}


def is_same(found: QuantizedWeight, wanted: QuantizedWeight) -> bool:
    """Tell whether two weights have the same codes, scales and zero points. `found` may have smaller groups."""
    repeats = found.scale.shape[1] // wanted.scale.shape[1]
    scale, zero = (each.repeat_interleave(repeats, dim=1) for each in (wanted.scale, wanted.zero))
    same_scale = torch.equal(found.scale.double(), scale.double())
    return same_scale and torch.equal(found.q, wanted.q) and torch.equal(found.zero, zero)


def _float16(name: str, values: Tensor, what: str) -> Tensor:
    """Return numbers as float16. Raises CheckpointError unless they are numbers of float16."""
    stored = values.to(torch.float16)
    if not torch.equal(stored.to(values.dtype), values):
        how = "quantize with --format gguf, which chooses scales that can be stored"
        raise CheckpointError(f"{name}: {what} is no float16 number, and GGUF stores these; {how}")
    return stored


def _zeros(name: str, scale: Tensor, least: Tensor) -> Tensor:
    """Return the zero points of Q4_1 blocks. Raises CheckpointError if one is no code."""
    zero = (-least.double() / scale.double()).round().clamp(0, 15)
    zero = torch.where(scale == 0, 0, zero)
    if not torch.equal(-(scale.double() * zero), least.double()):
        raise CheckpointError(f"{name}: a least weight of a Q4_1 block is no multiple of its scale; load it in float")
    return zero.to(torch.uint8)


def _packed(codes: UInt8[Tensor, "out blocks weights"], kind: str) -> UInt8[Tensor, "out blocks nbytes"]:
    """Return the codes of each block as it stores them."""
    if kind == "Q8_0":
        return codes ^ 0x80  # q - 128 as int8
    if kind == "Q2_0":
        fours = (3 - codes).unflatten(-1, (-1, 4))
        return fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


def _unpacked(stored: UInt8[Tensor, "out blocks nbytes"], kind: str) -> UInt8[Tensor, "out blocks weights"]:
    """Return the codes that `_packed` stored."""
    if kind == "Q8_0":
        return stored ^ 0x80
    if kind == "Q2_0":
        return 3 - torch.stack([stored >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    return torch.cat([stored & 15, stored >> 4], dim=-1)
