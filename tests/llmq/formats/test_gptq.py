"""The tensors of the GPTQ format: against integers other libraries write, and against itself."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import assert_same_weight, random_weight
from stored import (
    DAMAGE,
    DTYPES,
    NAME,
    check_missing_parts,
    check_refused,
    check_round_trip,
    damaged,
    golden_weight,
    sha,
)

from llmq.core.errors import CheckpointError
from llmq.core.settings import GPTQ_BITS
from llmq.formats import compressed_tensors, gptq
from llmq.formats.scheme import Scheme

QWEIGHT_4 = """
    1392285232 -362332233 1927120958 -1170002763 1119450428 -2060465821 496657130 -1526678687
    -311009304 1978443887 -1202520938 1087214877 -667685228 279544347 -1474307182 -343593015
    -629924168 1159566690 -1150935865 554341153 -1756161402 229065195 2017511573 -291942406
    1413334612 -897167943 819622942 -1418462264 298611245 -2023687801 -38178580 1661839169
    1392285232 -76332856 1157277008 -395243624 838362144 -2060465821 782660603 1999493251
    463745739 1680578387 -1202520938 1373218350 -1437594698 1322739198 -1755395450 -343593015
    -629924168 1362011683 -662487399 1609397775 -700313995 229065195 -2075010730 196501964
    -2112837326 158675368 819622942 -1216082807 1055495423 -1253843867 1017668827 1661839169
"""
ZEROS_4 = {
    1: [[1985229328, 249346712], [-878082203, 1412567277]],
    2: [[-2023406815, 535677865], [-591751050, 1698898430]],
}
ZEROS_3 = {
    1: [[-786774392, 1796875096, 1754096452], [1186046517, -964110796, 593023258]],
    2: [[440359121, -43825173, -1927304088], [-1881787266, 1490156230, 1206590015]],
}
# (bits, outputs) -> checksums of the codes, and of the zero points in version 1 and 2
SHAS = {
    (2, 16): ("0eb1b7f472a2fe39", "ec632e56c7d6a640", "e53e00e0e5db44d5"),
    (3, 32): ("8effbde5fae4f70e", "45e4062ace29ffd9", "bb658ea27af06b24"),
    (4, 16): ("e36ad87c94c15b76", "a4f33e3507c2b8b9", "c15e15e4bba4ff97"),
    (8, 16): ("037777fd7993b6f9", "05c3b4b7460a715f", "cc1c0732b1e09c86"),
}
# bits -> the words of zero points in the middle, which repeat: version 1, version 2
MIDDLES = {
    2: ([0x55555555], [-1431655766]),
    3: ([-613566757, -1227133514, 1840700269], [613566756, 1227133513, -1840700270]),
    4: ([0x77777777], [-2004318072]),
    8: ([0x7F7F7F7F], [-2139062144]),
}


def written_as(version, bits=4, group_size=16):
    """The scheme that `encode` writes in this version: it goes by the symmetry."""
    return Scheme(bits, group_size, symmetric=version == 1)


def read_as(version, bits=4, group_size=16):
    """The scheme of a foreign asymmetric file of this version."""
    return Scheme(bits, group_size, symmetric=False, zero_offset=int(version == 1))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "rows"), SHAS)
def test_codes_and_zero_points_have_the_golden_checksums_and_are_read_back(bits, rows, version):
    weight = golden_weight(bits, rows)
    tensors = gptq.encode(NAME, weight, written_as(version, bits))
    assert sha(tensors[f"{NAME}.qweight"]) == SHAS[bits, rows][0]
    assert sha(tensors[f"{NAME}.qzeros"]) == SHAS[bits, rows][version]
    assert torch.equal(tensors[f"{NAME}.scales"], weight.scale.T)
    assert tensors[f"{NAME}.g_idx"].tolist() == [0] * 16 + [1] * 16
    assert_same_weight(gptq.decode(NAME, tensors, read_as(version, bits)), weight)


@pytest.mark.parametrize("version", [1, 2])
def test_codes_and_zero_points_are_the_golden_integers(version):
    four = gptq.encode(NAME, golden_weight(4), written_as(version))
    assert four[f"{NAME}.qweight"].flatten().tolist() == [int(word) for word in QWEIGHT_4.split()]
    assert four[f"{NAME}.qzeros"].tolist() == ZEROS_4[version]
    three = gptq.encode(NAME, golden_weight(3, 32), written_as(version, 3))
    assert three[f"{NAME}.qzeros"].tolist() == ZEROS_3[version]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_symmetric_zero_points_are_the_words_that_readers_compare_with(bits, version):
    weight = random_weight(64, 64, 2, bits)
    words = gptq.encode(NAME, weight, written_as(version, bits, 32))[f"{NAME}.qzeros"].tolist()
    constant = MIDDLES[bits][version - 1]
    assert words == [constant * (2 * bits // len(constant))] * 2


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_the_tensors_are_those_of_compressed_tensors_transposed(bits):
    weight, scheme = random_weight(33, 96, 3, bits, symmetric=False), Scheme(bits, 32, False)
    ours, theirs = gptq.encode(NAME, weight, scheme), compressed_tensors.encode(NAME, weight, scheme)
    pairs = {"qweight": "weight_packed", "qzeros": "weight_zero_point", "scales": "weight_scale"}
    assert all(torch.equal(ours[f"{NAME}.{one}"], theirs[f"{NAME}.{other}"].T) for one, other in pairs.items())


def test_encode_writes_the_parts_of_the_format_in_their_dtypes():
    weight = random_weight(48, 96, 3, 3, dtype=torch.bfloat16)
    tensors = gptq.encode(NAME, weight, Scheme(3, 32, True))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        f"{NAME}.qweight": (torch.int32, (9, 48)),
        f"{NAME}.qzeros": (torch.int32, (3, 5)),
        f"{NAME}.scales": (torch.bfloat16, (3, 48)),
        f"{NAME}.g_idx": (torch.int32, (96,)),
    }
    assert set(tensors) == {f"{NAME}.{part}" for part in gptq.TENSOR_SUFFIXES}


@st.composite
def weights(draw):
    """A weight with its scheme: odd numbers of outputs, inputs that just fill words, groups of any size."""
    bits, symmetric, dtype = (draw(st.sampled_from(choices)) for choices in (GPTQ_BITS, [True, False], DTYPES))
    rows = draw(st.sampled_from([1, 2, 7, 31, 32, 33, 40]))
    columns = 32 // math.gcd(bits, 32) * draw(st.integers(1, 9))
    size = draw(st.sampled_from([-1, 1, 5, 8, 16, 24, 32, 128, columns]))
    groups = 1 if size == -1 else -(-columns // size)
    weight = random_weight(rows, columns, groups, bits, symmetric, dtype, draw(st.integers(0, 1000)))
    if groups > 1 and columns % size:  # the last group is short
        weight = dataclasses.replace(weight, group_of=torch.arange(columns, dtype=torch.int32) // size)
    return weight, Scheme(bits, size, symmetric)


@given(weights())
@settings(max_examples=200, deadline=None)
def test_decode_gives_back_what_encode_was_given(drawn):
    weight, scheme = drawn
    check_round_trip(gptq, weight, scheme, dataclasses.replace(scheme, zero_offset=int(scheme.symmetric)))


@given(weights())
@settings(max_examples=60, deadline=None)
def test_a_file_without_group_indices_has_contiguous_groups(drawn):
    weight, scheme = drawn
    tensors = gptq.encode(NAME, weight, scheme)
    del tensors[f"{NAME}.g_idx"]
    read = gptq.decode(NAME, tensors, dataclasses.replace(scheme, zero_offset=int(scheme.symmetric)))
    assert_same_weight(read, weight)


ACT_ORDER = Scheme(4, 16, False, act_order=True)


def act_order_weight():
    """Groups of one size, spread over the row."""
    group_of = (torch.arange(64) // 16)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    return dataclasses.replace(random_weight(16, 64, 4, symmetric=False), group_of=group_of.to(torch.int32))


def test_act_order_is_read_back_and_needs_its_indices():
    weight = act_order_weight()
    check_round_trip(gptq, weight, ACT_ORDER)
    tensors = gptq.encode(NAME, weight, ACT_ORDER)
    assert torch.equal(tensors[f"{NAME}.g_idx"], weight.group_of)
    del tensors[f"{NAME}.g_idx"]
    check_refused(gptq, tensors, ACT_ORDER, "g_idx is missing")


def test_act_order_that_the_config_does_not_know_of_is_refused():
    tensors = gptq.encode(NAME, act_order_weight(), ACT_ORDER)
    check_refused(gptq, tensors, dataclasses.replace(ACT_ORDER, act_order=False), "the config says no desc_act")


@pytest.mark.parametrize("size", [-1, 16])
def test_act_order_in_name_only_is_contiguous_groups(size):
    weight = random_weight(16, 64, 1 if size == -1 else 4, symmetric=False)
    scheme = Scheme(4, size, False, act_order=True)
    assert gptq.decode(NAME, gptq.encode(NAME, weight, scheme), scheme).group_of is None


INDICES = {
    "too high": lambda t: t.index_fill(0, torch.tensor([3]), 4),
    "negative": lambda t: t.index_fill(0, torch.tensor([3]), -1),
    "as int64": lambda t: t.long(),
    "too few": lambda t: t[:-1],
    "two rows": lambda t: torch.stack([t, t]),
}


@pytest.mark.parametrize("case", INDICES)
def test_group_indices_that_do_not_fit_are_refused(case):
    tensors = gptq.encode(NAME, act_order_weight(), ACT_ORDER)
    tensors[f"{NAME}.g_idx"] = INDICES[case](tensors[f"{NAME}.g_idx"])
    check_refused(gptq, tensors, ACT_ORDER)


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_a_zero_point_of_minus_one_is_refused_in_version_1_and_is_the_largest_code_in_version_2(bits):
    weight = random_weight(32, 32, 2, bits, symmetric=False)
    zero = weight.zero.clone()
    zero[5, 1] = 2**bits - 1
    tensors = gptq.encode(NAME, dataclasses.replace(weight, zero=zero), Scheme(bits, 16, False))
    check_refused(gptq, tensors, read_as(1, bits), f"has a zero point of -1 or {2**bits}")
    assert torch.equal(gptq.decode(NAME, tensors, read_as(2, bits)).zero, zero)


def test_zero_points_off_the_middle_are_refused_where_the_config_says_symmetric():
    tensors = gptq.encode(NAME, golden_weight(4), written_as(2))
    check_refused(gptq, tensors, Scheme(4, 16, True), "zero points are not all 8")


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_do_not_fit_are_refused(case):
    tensors = gptq.encode(NAME, random_weight(24, 64, 4, symmetric=False), ACT_ORDER)
    check_refused(gptq, damaged(tensors, case), ACT_ORDER)


def test_a_linear_that_lacks_any_of_its_parts_is_refused():
    check_missing_parts(gptq, gptq.encode(NAME, act_order_weight(), ACT_ORDER), ACT_ORDER)


@pytest.mark.parametrize(("bits", "size"), [(3, 16), (8, 16), (2, 16), (4, 32), (4, 8), (4, -1)])
def test_a_scheme_that_is_not_the_tensors_is_refused(bits, size):
    check_refused(gptq, gptq.encode(NAME, golden_weight(4), written_as(2)), Scheme(bits, size, False))


@pytest.mark.parametrize(("bits", "columns"), [(4, 12), (3, 48), (2, 8), (8, 7)])
def test_inputs_that_fill_no_words_are_refused_when_written(bits, columns):
    with pytest.raises(CheckpointError, match=f"{columns} inputs of {bits} bits fill no whole"):
        gptq.encode(NAME, random_weight(8, columns, 1, bits), Scheme(bits, -1, True))


@pytest.mark.parametrize("size", [2**31, 2**63, 10**400], ids=["2^31", "2^63", "10^400"])
def test_a_group_size_beyond_all_rows_is_one_group(size):
    weight = random_weight(8, 64, symmetric=False)
    scheme = gptq.schemes_of({"bits": 4, "group_size": size, "sym": False, "format": "gptq_v2"}, [NAME])[NAME]
    assert_same_weight(gptq.decode(NAME, gptq.encode(NAME, weight, Scheme(4, -1, False)), scheme), weight)
