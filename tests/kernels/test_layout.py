"""The memory layout: exactly the promised bits, and nothing lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmq_kernels import PackedWeight, pack
from llmq_kernels.layout import PLANE_WIDTHS, unpack

BITS = sorted(PLANE_WIDTHS)


def some_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)


def packed(codes, bits, groups=1):
    shape = (codes.shape[0], groups)
    return pack(codes, torch.ones(shape), torch.zeros(shape, dtype=torch.uint8), bits)


@given(st.sampled_from(BITS), st.integers(1, 19), st.integers(1, 71), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_unpacking_is_the_exact_inverse_of_packing(bits, rows, columns, seed):
    codes = some_codes(rows, columns, bits, seed)
    before = codes.clone()
    assert torch.equal(unpack(packed(codes, bits)), codes)
    assert torch.equal(codes, before)


@given(st.sampled_from(BITS), st.integers(2, 19), st.integers(1, 41), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_of_rows_unpacks_alone(bits, rows, columns, data):
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows + 5))
    codes = some_codes(rows, columns, bits)
    assert torch.equal(unpack(packed(codes, bits), start, stop), codes[start:stop])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (7, 64), (13, 576)])
def test_memory_is_exactly_bits_per_weight(bits, rows, columns):
    planes = packed(some_codes(rows, columns, bits), bits).planes
    assert sum(plane.nbytes for plane in planes) * 8 == rows * columns * bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 3, 7, 31, 37])
def test_rows_that_fill_no_byte_are_padded_to_the_next_one_per_plane(bits, columns):
    planes = packed(some_codes(5, columns, bits), bits).planes
    assert [tuple(p.shape) for p in planes] == [(5, -(-columns * width // 8)) for width in PLANE_WIDTHS[bits]]
    assert all(plane.dtype == torch.uint8 and plane.is_contiguous() for plane in planes)


def test_a_four_bit_byte_holds_two_codes_half_a_row_apart():
    codes = torch.tensor([[1, 2, 3, 10, 11]], dtype=torch.uint8)
    (plane,) = packed(codes, 4).planes
    assert plane.tolist() == [[1 | 10 << 4, 2 | 11 << 4, 3]]


def test_three_bit_codes_are_a_plane_of_low_bits_and_a_plane_of_high_bits():
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    low, high = packed(codes, 3).planes
    # Low bits 0 1 2 3 0 1 2 3: columns 0, 2, 4, 6 in the first byte, 1, 3, 5, 7 in the second.
    assert low.tolist() == [[0b10_00_10_00, 0b11_01_11_01]]
    assert high.tolist() == [[0b1111_0000]]


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        packed(some_codes(2, 8, 1), bits)


def test_groups_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(ValueError, match="3 groups do not divide 8 inputs"):
        packed(some_codes(2, 8, 4), 4, groups=3)


def test_the_shape_of_a_packed_weight_is_read_off_its_tensors():
    weight = packed(some_codes(5, 42, 3), 3, groups=6)
    assert isinstance(weight, PackedWeight)
    assert (weight.out_features, weight.in_features, weight.group_size, weight.bits) == (5, 42, 7, 3)
