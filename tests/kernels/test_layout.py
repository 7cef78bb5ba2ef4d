"""The memory layout: exactly the promised bits, and nothing lost."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmq_kernels import PackedWeight, dequantize, layout, pack, stack
from llmq_kernels.layout import block_of, plane_of, top_bits, unpack
from weights import BITS, WIDTHS, dense, shuffled_groups, some_codes, some_grid, some_weight

GROUPS = (1, 7, 16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def packed(codes, bits, groups=1, zero=0):
    shape = (codes.shape[0], groups)
    return pack(codes, torch.ones(shape), torch.full(shape, zero, dtype=torch.uint8), bits)


def signed(word):
    """An int16 written as the 16 bits that it is."""
    return word - 2**16 if word >= 2**15 else word


@st.composite
def problems(draw):
    """(codes, scale, zero, bits): any width, groups of any size or one per row, zero points and scales of any sort."""
    bits, rows, seed = draw(st.sampled_from(BITS)), draw(st.integers(1, 9)), draw(st.integers(0, 2**31))
    size, groups = draw(st.sampled_from([(size, n) for size in GROUPS for n in (1, 2, 3, 5)] + [(129, 1), (576, 1)]))
    codes = some_codes(rows, size * groups, bits, seed)
    return codes, *some_grid(rows, groups, bits, draw(st.booleans()), draw(st.sampled_from(DTYPES)), seed), bits


@given(problems())
@settings(max_examples=200, deadline=None)
def test_codes_and_zero_points_come_back_exactly(problem):
    codes, _, zero, _ = problem
    before = [tensor.clone() for tensor in problem[:3]]
    weight = pack(*problem)
    assert torch.equal(unpack(weight), codes)
    assert torch.equal(weight.zero(), zero)
    assert all(torch.equal(a, b) for a, b in zip(before, problem[:3], strict=True))


def words_one_by_one(codes, bits, plane):
    """The words of one row, by the pictures in layout.py: each bit of each code is put where it belongs."""
    arrays, shift = [], 0
    for width in WIDTHS[bits]:
        per_word, block = 16 // width, plane * 16 // WIDTHS[bits][-1]
        words = [0] * (-(-len(codes) // block) * block // per_word)
        for column, code in enumerate(codes):
            p, c = column // plane % per_word, column % plane
            at = p * width if width == WIDTHS[bits][0] else top_bits(bits, p)
            words[column // (plane * per_word) * plane + c] |= (code >> shift & (1 << width) - 1) << at
        arrays.append([signed(word) for word in words])
        shift += width
    return arrays


@given(problems(), st.booleans(), st.sampled_from([1, 300, 1 << 20]))
@settings(max_examples=100, deadline=None)
def test_words_are_those_of_single_codes_whatever_is_packed_at_a_time(problem, shuffled, at_a_time):
    codes, scale, zero, bits = problem
    group_of = shuffled_groups(codes.shape[1], scale.shape[1]) if shuffled else None
    with mock.patch.object(layout, "_CODES", at_a_time):
        weight = pack(codes, scale, zero, bits, group_of)
    rows = codes if group_of is None else codes[:, torch.argsort(group_of, stable=True)]
    expected = [words_one_by_one(row, bits, weight.plane) for row in rows.tolist()]
    assert [list(row) for row in zip(*(words.tolist() for words in weight.words), strict=True)] == expected


@given(problems())
@settings(max_examples=200, deadline=None)
def test_scales_come_back_exactly_or_to_sixteen_bits(problem):
    _, scale, zero, bits = problem
    weight = pack(*problem)
    assert weight.symmetric == bool((zero == 2 ** (bits - 1)).all())
    expected = scale.float() if weight.symmetric or scale.dtype != torch.float32 else sixteen_bits(scale)
    assert torch.equal(weight.scale(), expected)


def sixteen_bits(scale):
    """float32 rounded to 16 significant bits, to nearest, ties to even."""
    mantissa, exponent = np.frexp(scale.double().numpy())
    return torch.from_numpy(np.ldexp(np.rint(mantissa * 2**16), exponent - 16)).float()


@given(st.lists(st.floats(2**-120, 2**120, width=32), min_size=1, max_size=40), st.sampled_from([-1, 1]), st.data())
@settings(max_examples=100, deadline=None)
def test_a_float32_scale_beside_a_zero_point_is_rounded_to_the_nearest(magnitudes, sign, data):
    scale = sign * torch.tensor([magnitudes])
    zero = torch.tensor([[data.draw(st.integers(0, 7)) for _ in magnitudes]], dtype=torch.uint8)
    weight = pack(torch.zeros(1, len(magnitudes), dtype=torch.uint8), scale, zero, 4)
    assert not weight.symmetric
    assert torch.equal(weight.zero(), zero)
    assert torch.equal(weight.scale(), sixteen_bits(scale))
    assert bool(((weight.scale().double() - scale.double()).abs() <= 2**-16 * scale.double().abs()).all())


@pytest.mark.parametrize(("low", "kept"), [(0x80, 0), (0x81, 1), (0x7F, 0), (0x180, 2), (0x17F, 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_of_a_scale_go_to_the_even_neighbour(low, kept, sign):
    scale = sign * torch.tensor([[1 + low * 2**-23]])
    assert float(packed_scale(scale)) == sign * (1 + kept * 2**-15)


def packed_scale(scale):
    return pack(torch.zeros(1, 1, dtype=torch.uint8), scale, torch.zeros(1, 1, dtype=torch.uint8), 4).scale()


@pytest.mark.parametrize("value", [6e-8, -6e-8, 65504.0, -65504.0, 0.0, 2**-14 - 2**-24])
def test_every_float16_scale_is_exact_down_to_the_smallest(value):
    scale = torch.tensor([[value]], dtype=torch.float16)
    assert float(packed_scale(scale)) == float(scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_all_finite_scales_of_sixteen_bits_are_exact_beside_a_zero_point(dtype):
    scale = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    scale = scale[scale.isfinite()][None]
    zero = torch.full(scale.shape, 255, dtype=torch.uint8)
    weight = pack(torch.zeros(scale.shape, dtype=torch.uint8), scale, zero, 8)
    assert torch.equal(weight.scale(), scale.float())
    assert torch.equal(weight.zero(), zero)


@given(st.sampled_from(BITS), st.integers(2, 19), st.integers(1, 41), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_of_rows_unpacks_alone(bits, rows, columns, data):
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows + 5))
    codes = some_codes(rows, columns, bits)
    assert torch.equal(unpack(packed(codes, bits), start, stop), codes[start:stop])


@pytest.mark.parametrize(("bits", "group"), itertools.product(BITS, (16, 32, 64, 256)))
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 2), (13, 3)])
def test_memory_is_exactly_bits_per_weight_and_a_word_per_group(rows, blocks, bits, group):
    columns = blocks * 1024  # whole blocks for every width and plane
    weight = packed(some_codes(rows, columns, bits), bits, columns // group)
    assert sum(words.nbytes for words in weight.words) * 8 == rows * columns * bits
    assert weight.grid.nbytes == rows * (columns // group) * 4


@pytest.mark.parametrize(("bits", "size"), itertools.product(BITS, (7, 16, 32, 64)))
def test_rows_are_padded_to_whole_blocks(bits, size):
    weight = packed(some_codes(5, 3 * size, bits), bits, 3)
    plane = size if size in (16, 32) else 64
    block = plane * {2: 8, 3: 16, 4: 4, 5: 16, 6: 8, 8: 2}[bits]
    assert (weight.plane, block_of(bits, weight.plane)) == (plane, block)
    padded = -(-3 * size // block) * block
    widths = WIDTHS[bits]
    assert [tuple(words.shape) for words in weight.words] == [(5, padded * width // 16) for width in widths]
    assert all(words.dtype == torch.int16 and words.is_contiguous() for words in weight.words)
    assert weight.grid.dtype == torch.int32
    assert weight.grid.is_contiguous()


@pytest.mark.parametrize("size", [16, 32])
def test_a_row_that_is_one_small_group_has_full_planes(size):
    assert plane_of(size, size) == 64
    assert plane_of(size, 2 * size) == size


@pytest.mark.parametrize(
    ("bits", "columns", "expected"),
    [
        (2, [0, 16, 32, 48, 64, 80, 96, 112], [1 | 2 << 2 | 3 << 4 | 0 << 6 | 2 << 8 | 1 << 10 | 3 << 12 | 1 << 14]),
        (4, [0, 16, 32, 48], [1 | 2 << 4 | 3 << 8 | 0 << 12]),
        (8, [0, 16], [1 | 2 << 8]),
    ],
)
def test_a_word_holds_codes_a_plane_apart_the_first_one_lowest(bits, columns, expected):
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, columns] = torch.tensor([1, 2, 3, 0, 2, 1, 3, 1][: len(columns)], dtype=torch.uint8)
    (words,) = packed(codes, bits, 16).words
    assert words[0, 0].item() == signed(expected[0])
    assert not words[0, 1:].any()


def test_four_bit_words_are_these():
    codes = (torch.arange(512) * 7 % 16).to(torch.uint8)[None]  # 64 columns on, 448 % 16 == 0: equal nibbles
    codes[0, 64:128] ^= 1
    codes[0, 192:256] ^= 8
    (words,) = packed(codes, 4).words
    assert words.shape == (1, 128)
    first = [0x8010, 0xF767, 0x6EFE, 0xD545]
    assert words[0, :4].tolist() == [signed(word) for word in first]
    assert words[0, 64:68].tolist() == [0x0000, 0x7777, signed(0xEEEE), 0x5555]


def test_three_bit_codes_are_two_bit_words_and_one_bit_words_whose_bits_are_spread():
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, :8] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])  # plane 0
    codes[0, 16:24] = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])  # plane 1
    codes[0, 64:72] = 4  # plane 4: its top bit comes second
    codes[0, 128:136] = 6  # plane 8: the second set of words
    low, top = packed(codes, 3, 16).words
    assert (low.shape, top.shape) == ((1, 32), (1, 16))
    assert low[0, :8].tolist() == [0b1100, 0b1001, 0b0110, 0b0011, 0b1100, 0b1001, 0b0110, 0b0011]
    assert low[0, 16:24].tolist() == [0b10] * 8
    assert top[0, :8].tolist() == [0b1_0000_0110] * 4 + [0b1_0000_0011] * 4


def test_five_and_six_bit_codes_are_four_bit_words_and_words_of_what_is_above():
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, :256:16] = torch.arange(16, 32)  # plane 0: 16, plane 1: 17, …
    low, top = packed(codes, 5, 16).words
    assert low[0, ::16].tolist() == [signed(word) for word in (0x3210, 0x7654, 0xBA98, 0xFEDC)]
    assert top[0, 0].item() == signed(0xFFFF)
    codes[0, :256:16] = torch.tensor([0x1A, 0x2B, 0x3C, 0x0D, 0x11, 0x22, 0x33, 0x04] * 2)
    low, top = packed(codes, 6, 16).words
    assert low[0, ::16].tolist() == [signed(word) for word in (0xDCBA, 0x4321) * 2]
    # Bits 0 and 1: plane 0. 2 and 3: plane 2. 4 and 5: plane 1. 6 and 7: plane 3. Then planes 4 to 7 likewise.
    assert top[0, 0].item() == 0b00_10_11_01_00_10_11_01


@pytest.mark.parametrize(
    ("bits", "places"),
    [
        (3, [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]),
        (5, [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]),
        (6, [0, 4, 2, 6, 8, 12, 10, 14]),
    ],
)
def test_the_top_bits_of_all_planes_have_a_place_each(bits, places):
    assert [top_bits(bits, plane) for plane in range(len(places))] == places


def test_a_grid_word_is_the_scale_with_the_zero_point_in_its_last_byte():
    scale, codes = torch.tensor([[1.5, -0.25]]), torch.zeros(1, 32, dtype=torch.uint8)
    weight = pack(codes, scale, torch.tensor([[3, 255]], dtype=torch.uint8), 8)
    assert weight.grid.tolist() == [[0x3FC00003], [0xBE8000FF - 2**32]]
    weight = pack(codes, scale, torch.tensor([[128, 128]], dtype=torch.uint8), 8)
    assert weight.grid.tolist() == [[0x3FC00000], [0xBE800000 - 2**32]]


@pytest.mark.parametrize(("groups", "size"), [(1, 8), (5, 7), (4, 32), (3, 128)])
@pytest.mark.parametrize("bits", BITS)
def test_shuffled_groups_are_sorted_and_remember_their_inputs(bits, groups, size):
    group_of = shuffled_groups(groups * size, groups)
    codes, (scale, zero) = some_codes(5, groups * size, bits), some_grid(5, groups, bits, symmetric=False)
    weight = pack(codes, scale, zero, bits, group_of)
    assert group_of[weight.permutation].tolist() == sorted(group_of.tolist())
    assert torch.equal(unpack(weight), codes[:, weight.permutation])
    assert torch.equal(dequantize(weight, torch.float64), dense(codes, scale, zero, group_of))


def test_inputs_of_a_group_keep_their_order():
    weight = pack(some_codes(1, 6, 4), *some_grid(1, 2, 4), 4, torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.int32))
    assert weight.permutation.tolist() == [1, 3, 4, 0, 2, 5]


@pytest.mark.parametrize("group_of", [[0, 0, 0, 1], [0, 0, 2, 2], [1, 1, 2, 2], [1, 0, 0, 0]], ids=str)
def test_shuffled_groups_of_unequal_sizes_are_refused(group_of):
    with pytest.raises(ValueError, match="every group must have 2 inputs"):
        pack(some_codes(3, 4, 4), *some_grid(3, 2, 4), 4, torch.tensor(group_of, dtype=torch.int32))


@pytest.mark.parametrize("bits", [0, 1, 7, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        packed(some_codes(2, 8, 1), bits)


def test_groups_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(ValueError, match="3 groups do not divide 8 inputs"):
        packed(some_codes(2, 8, 4), 4, groups=3)


def test_the_shape_of_a_packed_weight_is_read_off_its_tensors():
    weight, _ = some_weight(5, 42, 6, 3)
    assert isinstance(weight, PackedWeight)
    assert (weight.out_features, weight.in_features, weight.group_size, weight.bits) == (5, 42, 7, 3)
    assert weight.device == torch.device("cpu")
    assert weight.permutation is None


@pytest.mark.parametrize(("bits", "symmetric", "shuffled"), itertools.product(BITS, (True, False), (True, False)))
def test_stacked_weights_have_the_rows_of_all(bits, symmetric, shuffled):
    group_of = shuffled_groups(96, 3) if shuffled else None
    weights = [some_weight(rows, 96, 3, bits, symmetric, seed=rows, group_of=group_of) for rows in (5, 1, 17)]
    whole = stack([weight for weight, _ in weights])
    assert whole.out_features == 23
    assert torch.equal(dequantize(whole, torch.float64), torch.cat([dense for _, dense in weights]))


def test_weights_that_differ_in_kind_are_not_stacked():
    kinds = [(96, 3, 4), (96, 3, 3), (96, 6, 4), (64, 2, 4), (96, 3, 4, False)]
    weights = [some_weight(5, *kind)[0] for kind in kinds]
    weights += [some_weight(5, 96, 3, 4, group_of=shuffled_groups(96, 3, seed))[0] for seed in (0, 1)]
    assert all(stack(pair) is None for pair in itertools.permutations(weights, 2))
