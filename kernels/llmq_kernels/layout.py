"""How a weight lies in memory at inference: planes of 16-bit words, and one 32-bit (scale, zero) word per group.

Codes. A word holds one code of each of several planes; a plane is `plane` consecutive inputs of one row, and all planes
that share the words of `plane` columns make a block. 4 bit, plane 64, so a block is 256 inputs:

                    bits 15..12     11..8         7..4         3..0
    word c     =  code[192 + c]  code[128 + c]  code[64 + c]  code[c]         c = 0..63, then the next block

Two neighbouring words are one 32-bit register, and the same nibble of both is one fp16 pair: `and`, `or` and `fma` turn
it into two exact halves of a tensor-core operand. Codes of other layouts need shuffles or conversions here.

Codes of 3, 5 and 6 bits have two arrays of words, so that they take exactly 3, 5 and 6 bits per weight: their low two
or four bits, and the one or two bits above (`top_bits` says where):

    bits   words     codes in a low word, a high word    planes in a block
    3      2 + 1             8             16                   16
    5      4 + 1             4             16                   16
    6      4 + 2             4              8                    8

A plane never straddles two groups, so groups of 16 and 32 have planes of 16 and 32.

Grid. A symmetric weight stores the float32 scale, whose zero point is 2**(bits-1). Otherwise the low 8 bits of the
float32 scale are the zero point: exact for float16 and bfloat16 scales; a float32 scale keeps 16 significant bits.

A tiny weight: one row of 64 inputs in 4 groups, so planes of 16. Codes 0, 16, 32 and 48 share word 0:

    >>> codes = torch.full((1, 64), 8, dtype=torch.uint8)              # [out, in]
    >>> codes[0, [0, 16, 32, 48]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    >>> scale = torch.full((1, 4), 0.5)                                # [out, groups]
    >>> zero = torch.full((1, 4), 8, dtype=torch.uint8)                # [out, groups]
    >>> weight = pack(codes, scale, zero, bits=4)
    >>> weight.plane, weight.symmetric, weight.words[0].shape          # 64 codes of 4 bits = 16 words of 16
    (16, True, torch.Size([1, 16]))
    >>> hex(int(weight.words[0][0, 0])), weight.grid.shape             # the grid is [groups, out]
    ('0x4321', torch.Size([4, 1]))
    >>> torch.equal(unpack(weight), codes)                             # [out, in]
    True
    >>> (weight.scale()[0, 0] * (unpack(weight)[0, :2].float() - weight.zero()[0, 0]))   # 0.5 * ([1, 8] - 8)
    tensor([-3.5000,  0.0000])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int16, Int32, Int64, UInt8
from torch import Tensor

WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits per word field, low bits of the code first."""
_ZERO_MASK = 0xFF
# Codes packed at a time on a CPU: few enough for its cache, enough for several threads. On a GPU 16 times as many.
_CODES = 1 << 21


def top_bits(bits: int, plane: int) -> int:
    """Return the lowest bit that a plane's code has in a high word, for codes in two arrays of words.

    It is as far from the code's low bits in the low word as for other planes, for as many planes as possible: four
    shifts serve all planes of 3 and 6 bits, eight those of 5 bits.
    """
    low, high = WIDTHS[bits]
    in_byte = 8 // low
    return low * (plane % in_byte) + high * (plane // in_byte % (low // high)) + 8 * (plane // (8 // high))


@dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernels read it: w[n, k] = scale[n, group] * (code[n, k] - zero[n, group]).

    All tensors are on one device.
    """

    words: tuple[Int16[Tensor, "out _"], ...]
    """One array for each of WIDTHS[bits], [out, padded inputs * width / 16]."""
    grid: Int32[Tensor, "groups out"]
    bits: int
    group_size: int
    in_features: int
    symmetric: bool
    permutation: Int64[Tensor, "in"] | None = None
    """Column i of the codes belongs to input permutation[i]: act-order checkpoints, sorted by group."""

    @property
    def out_features(self) -> int:
        return self.grid.shape[1]

    @property
    def plane(self) -> int:
        return plane_of(self.group_size, self.in_features)

    @property
    def device(self) -> torch.device:
        return self.grid.device

    def scale(self) -> Float[Tensor, "out groups"]:
        """Return the scales as float32."""
        bits = self.grid if self.symmetric else self.grid & ~_ZERO_MASK
        return bits.view(torch.float32).T

    def zero(self) -> UInt8[Tensor, "out groups"]:
        """Return the zero points in code units."""
        if self.symmetric:
            return torch.full_like(self.grid.T, 2 ** (self.bits - 1), dtype=torch.uint8)
        return (self.grid.T & _ZERO_MASK).to(torch.uint8)


def plane_of(group_size: int, in_features: int) -> int:
    """Return the inputs per plane: the group size if it is 16 or 32, else 64."""
    whole_row = group_size == in_features
    return group_size if group_size in (16, 32) and not whole_row else 64


def block_of(bits: int, plane: int) -> int:
    """Return the inputs per block of words. Rows are padded to whole blocks."""
    return plane * 16 // WIDTHS[bits][-1]


def pack(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: UInt8[Tensor, "out groups"],
    bits: int,
    group_of: Int32[Tensor, "in"] | None = None,
) -> PackedWeight:
    """Lay out plain codes, and return the packed weight.

    Args:
        group_of: the group of every input, where groups are not contiguous; groups must have equal sizes.

    Raises ValueError for bits that WIDTHS lacks, or groups that do not divide the inputs.
    """
    (rows, columns), groups = codes.shape, scale.shape[1]
    if bits not in WIDTHS:
        raise ValueError(f"bits must be one of {sorted(WIDTHS)}; got {bits}")
    if columns % groups:
        raise ValueError(f"{groups} groups do not divide {columns} inputs")
    size = columns // groups
    permutation = None if group_of is None else _sort_groups(group_of, size)
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    plane = plane_of(size, columns)
    padding = -columns % block_of(bits, plane)
    lengths = [(columns + padding) * width // 16 for width in WIDTHS[bits]]
    words = tuple(torch.empty(rows, length, dtype=torch.int16, device=codes.device) for length in lengths)
    step = max(1, (_CODES if codes.device.type == "cpu" else _CODES << 4) // max(1, columns))
    for start in range(0, rows, step):
        part = codes[start : start + step]
        if permutation is not None:
            part = part.gather(1, permutation.expand(len(part), -1))
        # Padding decodes to a zero weight only where the zero point agrees; the kernels never let padded inputs in.
        part, shift = torch.nn.functional.pad(part, (0, padding)) if padding else part, 0
        for width, array in zip(WIDTHS[bits], words, strict=True):
            fields = (part >> shift if shift else part) & 2**width - 1
            array[start : start + step] = _pack_words(fields, width, plane, bits)
            shift += width
    return PackedWeight(words, _pack_grid(scale, zero, symmetric), bits, size, columns, symmetric, permutation)


def unpack(weight: PackedWeight, start: int = 0, stop: int | None = None) -> UInt8[Tensor, "rows in"]:
    """Return the codes of rows start to stop. Columns stay in the packed order: sorted, if there is a permutation."""
    codes, shift = None, 0
    for width, words in zip(WIDTHS[weight.bits], weight.words, strict=True):
        part = _unpack_words(words[start:stop], width, weight.plane, weight.bits)
        codes = part if codes is None else codes | part << shift
        shift += width
    assert codes is not None
    return codes[:, : weight.in_features]


def stack(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """Join the rows of several weights into one. Return None unless bits, groups, inputs and their order agree."""
    first = weights[0]
    kinds = {(w.bits, w.group_size, w.in_features, w.symmetric, w.device, w.permutation is None) for w in weights}
    if len(kinds) > 1:
        return None
    if first.permutation is not None:
        for other in weights[1:]:
            if other.permutation is None or not torch.equal(first.permutation, other.permutation):
                return None
    words = tuple(torch.cat(arrays) for arrays in zip(*(w.words for w in weights), strict=True))
    return replace(first, words=words, grid=torch.cat([w.grid for w in weights], dim=1))


def _sort_groups(group_of: Tensor, size: int) -> Tensor:
    order = torch.argsort(group_of, stable=True)
    expected = torch.arange(len(group_of), dtype=group_of.dtype, device=group_of.device) // size
    if not torch.equal(group_of[order], expected):
        raise ValueError(f"every group must have {size} inputs to be sorted into place")
    return order


def _pack_grid(scale: Tensor, zero: Tensor, symmetric: bool) -> Tensor:
    bits = scale.T.contiguous().to(torch.float32).view(torch.int32)
    if symmetric:
        return bits
    half = (_ZERO_MASK >> 1) + (bits >> 8 & 1)  # round to nearest, ties to even; no carry out of a float's exponent
    return (bits + half & ~_ZERO_MASK) | zero.T.to(torch.int32)


def _shifts(width: int, bits: int) -> list[int]:
    """Return for every plane the lowest bit of its field in the word."""
    low = width == WIDTHS[bits][0]
    return [p * width if low else top_bits(bits, p) for p in range(16 // width)]


def _pack_words(fields: Tensor, width: int, plane: int, bits: int) -> Tensor:
    """Return the words of uint8 fields. Both bytes of a word are put together in uint8, at the same shifts."""
    half = 8 // width
    # Low words of a code in two arrays: several sets of planes per block.
    planes = fields.reshape(len(fields), -1, 2, half, plane)
    octets = planes[:, :, :, 0].clone()
    for p, shift in enumerate(_shifts(width, bits)[1:half], 1):
        octets |= planes[:, :, :, p] << shift
    low, high = octets.to(torch.int16).unbind(2)
    return (low | high << 8).flatten(1)


def _unpack_words(words: Tensor, width: int, plane: int, bits: int) -> Tensor:
    sets = words.unflatten(1, (-1, 1, plane))
    return torch.cat([(sets >> shift & 2**width - 1).to(torch.uint8) for shift in _shifts(width, bits)], dim=2).flatten(
        1
    )
