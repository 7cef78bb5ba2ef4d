"""How codes lie in memory at inference: planes of bytes, cheap to take apart with whole-tensor shifts.

A plane of `width` bits holds 8/width codes per byte, `stride` columns apart, so that unpacking writes long runs:

    width 4:   byte c of a row  =  code[c]  |  code[c + stride] << 4            stride = ceil(in / 2)

3-bit codes are a 2-bit plane and a 1-bit plane: exactly 3 bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

PLANE_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass(frozen=True)
class PackedWeight:
    """w = scale * (code - zero), codes in planes. All tensors on one device."""

    planes: tuple[UInt8[Tensor, "out _"], ...]
    """[out, ceil(in * width / 8)] for each width of PLANE_WIDTHS[bits], low bits of the code first."""
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    bits: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    @property
    def group_size(self) -> int:
        return self.in_features // self.scale.shape[1]


def pack(
    codes: UInt8[Tensor, "out in"], scale: Float[Tensor, "out groups"], zero: UInt8[Tensor, "out groups"], bits: int
) -> PackedWeight:
    """Lay out plain codes. Raises ValueError for bits other than 2, 3, 4, 8 or groups that do not divide the inputs."""
    if bits not in PLANE_WIDTHS:
        raise ValueError(f"bits must be one of {sorted(PLANE_WIDTHS)}; got {bits}")
    if codes.shape[1] % scale.shape[1]:
        raise ValueError(f"{scale.shape[1]} groups do not divide {codes.shape[1]} inputs")
    planes, shift = [], 0
    for width in PLANE_WIDTHS[bits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return PackedWeight(tuple(planes), scale, zero, bits, codes.shape[1])


def unpack(weight: PackedWeight, start: int = 0, stop: int | None = None) -> UInt8[Tensor, "rows in"]:
    """The codes of rows start to stop."""
    codes, shift = None, 0
    for width, plane in zip(PLANE_WIDTHS[weight.bits], weight.planes, strict=True):
        part = _unpack_plane(plane[start:stop], width, weight.in_features)
        codes = part if codes is None else codes | (part << shift)
        shift += width
    assert codes is not None
    return codes


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    stride = -(-codes.shape[1] // per_byte)
    padded = torch.nn.functional.pad(codes, (0, stride * per_byte - codes.shape[1]))
    plane = torch.zeros(len(codes), stride, dtype=torch.uint8, device=codes.device)
    for i, part in enumerate(padded.split(stride, dim=1)):
        plane |= part << (i * width)
    return plane


def _unpack_plane(plane: Tensor, width: int, columns: int) -> Tensor:
    mask = 2**width - 1
    parts = [(plane >> shift) & mask for shift in range(0, 8, width)]
    return torch.cat(parts, dim=1)[:, :columns]
