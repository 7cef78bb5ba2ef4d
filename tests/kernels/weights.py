"""Packed weights with known values, for the tests of the kernels."""

import torch
from llmq_kernels import PackedWeight, pack

BITS = (2, 3, 4, 5, 6, 8)
WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of a code in each array of words, the low ones first."""


def some_codes(out, inputs, bits, seed=0):
    return torch.randint(0, 2**bits, (out, inputs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def some_grid(out, groups, bits, symmetric=True, dtype=torch.float16, seed=0):
    """(scale, zero) of which some scales are negative."""
    generator = torch.Generator().manual_seed(seed + 1)
    scale = ((torch.rand(out, groups, generator=generator) - 0.5) / 2**bits).to(dtype)
    scale[0, 0] = -scale[0, 0].abs()
    zero = torch.full((out, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 2**bits, (out, groups), generator=generator).to(torch.uint8)
        zero[0, 0] = 0  # so that one weight out of one group is no symmetric one by chance
    return scale, zero


def some_weight(
    out, inputs, groups, bits, symmetric=True, dtype=torch.float16, seed=0, group_of=None
) -> tuple[PackedWeight, torch.Tensor]:
    """(weight, its dense value in float64 by the formula, columns in the order of the inputs)."""
    codes = some_codes(out, inputs, bits, seed)
    scale, zero = some_grid(out, groups, bits, symmetric, dtype, seed)
    return pack(codes, scale, zero, bits, group_of), dense(codes, scale, zero, group_of)


def dense(codes, scale, zero, group_of=None):
    """scale * (code - zero) in float64."""
    if group_of is None:
        group_of = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
    group_of = group_of.long()
    return scale.double()[:, group_of] * (codes.double() - zero.double()[:, group_of])


def shuffled_groups(inputs, groups, seed=0):
    """The group of every input, in an act-order checkpoint's manner."""
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(inputs) // (inputs // groups))[order].to(torch.int32)
