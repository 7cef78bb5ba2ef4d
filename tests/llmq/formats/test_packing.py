"""The one bit packer, against a packer that moves single bits and against integers other libraries write."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import golden_weight, sha

from llmq.formats import packing
from llmq.formats.packing import pack_stream, packed_length, unpack_stream

ROWS, COLUMNS = 16, 32

PACKED_4 = [
    [1392285232, -629924168, 1392285232, -629924168],
    [-362332233, 1159566690, -76332856, 1362011683],
    [1927120958, -1150935865, 1157277008, -662487399],
    [-1170002763, 554341153, -395243624, 1609397775],
    [1119450428, -1756161402, 838362144, -700313995],
    [-2060465821, 229065195, -2060465821, 229065195],
    [496657130, 2017511573, 782660603, -2075010730],
    [-1526678687, -291942406, 1999493251, 196501964],
    [-311009304, 1413334612, 463745739, -2112837326],
    [1978443887, -897167943, 1680578387, 158675368],
    [-1202520938, 819622942, -1202520938, 819622942],
    [1087214877, -1418462264, 1373218350, -1216082807],
    [-667685228, 298611245, -1437594698, 1055495423],
    [279544347, -2023687801, 1322739198, -1253843867],
    [-1474307182, -38178580, -1755395450, 1017668827],
    [-343593015, 1661839169, -343593015, 1661839169],
]
PACKED_3 = [
    [-1733573736, -1013404733, -1413244757],
    [1925937119, -1205824301, -1520069649],
    [669700126, -1519882397, -1606973037],
    [-781568739, -1849146334, -1084258365],
    [-2037801124, -1928315214, -1172193945],
    [1930786931, 2020808056, 360215317],
    [221555890, 1862001160, 312110681],
    [-95156495, 1510201497, 233596157],
    [-1395135504, 1185133017, 142891565],
    [1509377079, 871073897, 131485905],
    [241348366, -1358011729, 1655639650],
    [-528329907, -1785311298, 2084635046],
    [-1784562292, -2132924850, 2064858954],
    [1193349259, -42066162, 1983591834],
    [876673738, -393808482, 1896688446],
    [-506702367, 1440861269, -866786868],
]
ZEROS_4 = [[-2023406815, -591751050], [535677865, 1698898430]]
ZEROS_3 = [[440359121, -1881787266], [18411, 64198]]
# bits -> first 16 hex digits of sha256 over the little-endian words: (codes, zero points)
SHAS = {
    2: ("9398a34c62284fab", "e53e00e0e5db44d5"),
    3: ("6e8527cbd7cd640e", "02c109542a94cd22"),
    4: ("bd06e8851faeb58f", "138e6371f6ca88b8"),
    5: ("7c2b18194e2e2b6f", "1a0746f3aeb8e989"),
    6: ("163495161d3ff96f", "83223bb38be40c04"),
    8: ("45eb19d19b86ba68", "cfebfda312bb3408"),
}


def naive_words(codes, bits):
    """Pack one row, given as a list of ints, by writing every bit into a string."""
    stream = "".join(str(code >> i & 1) for code in codes for i in range(bits))
    stream += "0" * (-len(stream) % 32)
    words = [int(stream[at : at + 32][::-1], 2) for at in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@st.composite
def packings(draw):
    bits = draw(st.integers(1, 8))
    shape = draw(st.sampled_from([1, 2, 7, 13, 31, 37])), draw(st.sampled_from([1, 2, 5, 11, 31, 32, 33, 64, 97]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8), bits


@given(packings(), st.sampled_from([0, 1]), st.sampled_from([1, 100, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_unpacking_is_the_exact_inverse_of_packing(some, axis, at_a_time):
    with mock.patch.object(packing, "_CODES", at_a_time):
        check_inverse(*some, axis)


def check_inverse(codes, bits, axis):
    before = codes.clone()
    words = pack_stream(codes, bits, axis)
    expected = list(codes.shape)
    expected[axis] = packed_length(codes.shape[axis], bits)
    assert (words.dtype, list(words.shape), words.is_contiguous()) == (torch.int32, expected, True)
    unpacked = unpack_stream(words, bits, codes.shape[axis], axis)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)
    assert torch.equal(codes, before)


@given(packings())
@settings(max_examples=80, deadline=None)
def test_the_packed_words_are_one_little_endian_bit_stream_per_row(packing):
    codes, bits = packing
    assert pack_stream(codes, bits).tolist() == [naive_words(row, bits) for row in codes.tolist()]


@given(packings())
@settings(max_examples=40, deadline=None)
def test_packing_along_the_rows_is_packing_the_transpose(packing):
    codes, bits = packing
    assert torch.equal(pack_stream(codes, bits, axis=0).T, pack_stream(codes.T.contiguous(), bits, axis=1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_codes_fill_every_bit_and_the_padding_stays_zero(bits):
    n = 29  # prime: the last word is never full
    words = pack_stream(torch.full((1, n), 2**bits - 1, dtype=torch.uint8), bits)[0]
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))
    assert whole == 2 ** (n * bits) - 1
    assert len(words) == -(-n * bits // 32)


@pytest.mark.parametrize(("bits", "expected"), [(4, PACKED_4), (3, PACKED_3)])
def test_codes_pack_to_the_golden_integers(bits, expected):
    words = torch.tensor(expected, dtype=torch.int32)
    assert torch.equal(pack_stream(golden_weight(bits).q, bits), words)
    assert torch.equal(unpack_stream(words, bits, COLUMNS), golden_weight(bits).q)


@pytest.mark.parametrize(("bits", "expected"), [(4, ZEROS_4), (3, ZEROS_3)])
def test_zero_points_pack_along_the_outputs_to_the_golden_integers(bits, expected):
    words = torch.tensor(expected, dtype=torch.int32)
    assert torch.equal(pack_stream(golden_weight(bits).zero, bits, axis=0), words)
    assert torch.equal(unpack_stream(words, bits, ROWS, axis=0), golden_weight(bits).zero)


@pytest.mark.parametrize("bits", SHAS)
def test_packed_bytes_have_the_golden_checksums(bits):
    codes, zeros = SHAS[bits]
    assert sha(pack_stream(golden_weight(bits).q, bits)) == codes
    assert sha(pack_stream(golden_weight(bits).zero, bits, axis=0)) == zeros


def test_the_first_four_bit_word_is_the_one_computed_by_hand():
    codes = torch.tensor([[0, 3, 6, 9, 12, 15, 2, 5]], dtype=torch.uint8)
    assert pack_stream(codes, 4).item() == 0x52FC9630
    assert pack_stream(codes.T.contiguous(), 4, axis=0).item() == 1392285232


@pytest.mark.parametrize(("bits", "expected"), [(2, -1431655766), (4, -2004318072), (8, -2139062144)])
def test_symmetric_zero_points_pack_to_one_repeated_word(bits, expected):
    middle = torch.full((64, 1), 2 ** (bits - 1), dtype=torch.uint8)
    assert pack_stream(middle, bits, axis=0).flatten().tolist() == [expected] * (2 * bits)


def test_symmetric_three_bit_zero_points_pack_to_a_period_of_three_words():
    middle = torch.full((1, 32), 4, dtype=torch.uint8)
    assert pack_stream(middle, 3).flatten().tolist() == [613566756, 1227133513, -1840700270]
