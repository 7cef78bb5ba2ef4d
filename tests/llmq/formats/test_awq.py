"""The AWQ format: against integers other libraries write, against itself, and what its config says to readers."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import assert_same_weight, random_weight
from stored import (
    DAMAGE,
    DTYPES,
    LAYERS,
    NAME,
    check_missing_parts,
    check_refused,
    check_round_trip,
    damaged,
    golden_weight,
    sha,
)
from transformers import AwqConfig

from llmq.core.errors import CheckpointError
from llmq.formats import awq, packing
from llmq.formats.scheme import Scheme

SYMMETRIC, ASYMMETRIC = Scheme(4, 16, True), Scheme(4, 16, False)
# Inputs from top to bottom, four of them in a line; two words for 16 outputs each.
QWEIGHT = """
    324512992 -1679874968  1723589427 -1055483490  -1177606778 -229065009  -1138530423 681238261
    255306204 1507652390  38181855 -1966206121  1437258274 -1341814643  -1463937931 -515396162
    -1424861576 394907108  -31024949 1221321237  -248149298 2042430022  1150927121 -1342933124
    -1750269084 -801727315  -1711192729 108575955  -317356102 934990084  -534480451 1756164405
    864595968 -1629264277  -2036534701 -819623012  -1980746666 -177755198  -603687255 648659187
    -552376148 1469833252  578269183 -1915595430  1972101442 -1105954165  2028938053 -464086351
    -873241192 362332130  -838707301 1183506195  291938030 2093040713  1685770289 -1392285318
    1742606900 -750417504  -1159572345 76000977  -1108261238 897175042  5606877 1806709560
"""
QZEROS = [[-2042464975, 516619705], [-610809210, 1680823070]]
# outputs -> checksums of the codes and of the zero points
SHAS = {16: ("97e6afb555946259", "2bcbe42324b64432"), 32: ("0c5f957198c62cd3", "ace990d8a89d98dc")}


def test_codes_and_zero_points_are_the_golden_integers():
    tensors = awq.encode(NAME, golden_weight(4), ASYMMETRIC)
    assert tensors[f"{NAME}.qweight"].flatten().tolist() == [int(word) for word in QWEIGHT.split()]
    assert tensors[f"{NAME}.qzeros"].tolist() == QZEROS


def test_a_weight_is_read_back_a_few_outputs_at_a_time(monkeypatch):
    monkeypatch.setattr(packing, "_CODES", 20 * 8 * 3)  # three words of eight outputs
    check_round_trip(awq, random_weight(56, 20, 2), Scheme(4, 10, True))


@pytest.mark.parametrize("rows", SHAS)
def test_codes_and_zero_points_have_the_golden_checksums_and_are_read_back(rows):
    weight = golden_weight(4, rows)
    tensors = awq.encode(NAME, weight, ASYMMETRIC)
    assert (sha(tensors[f"{NAME}.qweight"]), sha(tensors[f"{NAME}.qzeros"])) == SHAS[rows]
    assert torch.equal(tensors[f"{NAME}.scales"], weight.scale.T)
    assert_same_weight(awq.decode(NAME, tensors, ASYMMETRIC), weight)


def test_the_outputs_of_a_word_are_even_ones_first():
    q = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 16)
    weight = dataclasses.replace(random_weight(8, 16, symmetric=False), q=q.contiguous())
    words = awq.encode(NAME, weight, ASYMMETRIC)[f"{NAME}.qweight"]
    assert words.shape == (16, 1)
    assert {f"{word:08x}" for word in words.flatten().tolist()} == {"75316420"}


def test_encode_writes_the_parts_of_the_format_in_their_dtypes():
    tensors = awq.encode(NAME, random_weight(48, 96, 3, dtype=torch.bfloat16), Scheme(4, 32, True))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        f"{NAME}.qweight": (torch.int32, (96, 6)),
        f"{NAME}.qzeros": (torch.int32, (3, 6)),
        f"{NAME}.scales": (torch.bfloat16, (3, 48)),
    }
    assert set(tensors) == {f"{NAME}.{part}" for part in awq.TENSOR_SUFFIXES}
    assert set(tensors[f"{NAME}.qzeros"].flatten().tolist()) == {-0x77777778}  # every zero point is 8


@st.composite
def weights(draw):
    """A weight with its scheme: outputs that just fill words, groups of any size that divides the inputs."""
    symmetric, dtype = draw(st.booleans()), draw(st.sampled_from(DTYPES))
    rows, size, groups = 8 * draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    weight = random_weight(rows, size * groups, groups, 4, symmetric, dtype, draw(st.integers(0, 1000)))
    return weight, Scheme(4, -1 if groups == 1 and draw(st.booleans()) else size, symmetric)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_decode_gives_back_what_encode_was_given(drawn):
    check_round_trip(awq, *drawn)


def with_groups(group_of):
    return dataclasses.replace(random_weight(8, 32, 2), group_of=torch.tensor(group_of, dtype=torch.int32))


UNSAYABLE = {
    "8 bits": (random_weight(8, 32, 2, bits=8), "awq stores 4-bit weights; this one has 8 bits"),
    "3 bits": (random_weight(8, 32, 2, bits=3), "awq stores 4-bit weights; this one has 3 bits"),
    "act order": (with_groups([0, 1] * 16), "awq stores contiguous groups"),
    "a short last group": (with_groups([0] * 20 + [1] * 12), "awq stores contiguous groups"),
    "outputs that fill no words": (random_weight(12, 32, 2), "awq packs eight outputs in a word; 12 outputs"),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_the_format_cannot_say_is_refused_when_written(case):
    weight, reason = UNSAYABLE[case]
    with pytest.raises(CheckpointError, match=f"^{re.escape(NAME)}: {reason}"):
        awq.encode(NAME, weight, SYMMETRIC)


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_do_not_fit_are_refused(case):
    tensors = awq.encode(NAME, random_weight(24, 64, 4, symmetric=False), ASYMMETRIC)
    check_refused(awq, damaged(tensors, case), ASYMMETRIC)


def test_a_linear_that_lacks_any_of_its_parts_is_refused():
    check_missing_parts(awq, awq.encode(NAME, golden_weight(4), ASYMMETRIC), ASYMMETRIC)


def test_zero_points_off_the_middle_are_refused_where_the_config_says_symmetric():
    check_refused(awq, awq.encode(NAME, golden_weight(4), ASYMMETRIC), SYMMETRIC, "zero points are not all 8")


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(4, 24, False), "group size 24 does not divide 32 inputs"),
        (Scheme(4, 20, False), "group size 20 does not divide 32 inputs"),
        (Scheme(4, 32, False), "expected int32"),
        (Scheme(4, 8, False), "expected int32"),
        (Scheme(4, -1, False), "expected int32"),
        (Scheme(8, 16, False), "awq stores 4-bit weights; its config says 8 bits"),
    ],
)
def test_a_scheme_that_is_not_the_tensors_is_refused(scheme, reason):
    check_refused(awq, awq.encode(NAME, golden_weight(4), ASYMMETRIC), scheme, reason)


@pytest.mark.parametrize("size", [-1, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_config_is_read_back_and_accepted_by_transformers(size, symmetric):
    schemes = dict.fromkeys(LAYERS, Scheme(4, size, symmetric))
    config = awq.hf_config(schemes, ["model.layers.3.mlp.down_proj", "lm_head"])
    assert awq.schemes_of(config, LAYERS) == schemes
    theirs = AwqConfig.from_dict(config)
    assert (theirs.bits, theirs.group_size, theirs.zero_point, theirs.format) == (4, size, True, "gemm")
    assert theirs.modules_to_not_convert == ["model.layers.3.mlp.down_proj", "lm_head"]
    assert awq.hf_config(schemes, [])["modules_to_not_convert"] is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Scheme(8, 16, True), "one number of bits, for all layers; these layers have 4, 8"),
        (Scheme(4, 32, True), "one group size for all layers; these layers have 16, 32"),
        (Scheme(4, 16, False), "one kind of zero points for all layers; these layers have False, True"),
    ],
)
def test_layers_that_differ_are_refused_when_the_config_is_written(other, reason):
    with pytest.raises(CheckpointError, match=f"awq stores {reason}"):
        awq.hf_config(dict.fromkeys(LAYERS, SYMMETRIC) | {NAME: other}, [])


def test_layers_of_other_bits_are_refused_when_the_config_is_written():
    with pytest.raises(CheckpointError, match="awq stores 4-bit weights"):
        awq.hf_config(dict.fromkeys(LAYERS, Scheme(8, 16, True)), [])


# foreign configs -> what they say of a linear
CONFIGS = {
    "AutoAWQ": ({"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}, Scheme(4, 64, False)),
    "its first file": (
        {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        Scheme(4, 128, False),
    ),
    "nothing at all": ({}, Scheme(4, 128, False)),
    "no zero points": ({"zero_point": False, "group_size": -1}, Scheme(4, -1, True)),
    "AutoRound's export": ({"zero_point": False, "sym": True, "group_size": 32}, Scheme(4, 32, True)),
    "sym first": ({"zero_point": True, "sym": True, "group_size": 32}, Scheme(4, 32, True)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_of_other_tools_are_read(case):
    config, scheme = CONFIGS[case]
    assert awq.schemes_of({"quant_method": "awq"} | config, [NAME]) == {NAME: scheme}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 8}, "version 'gemm' with 8 bits"),
        ({"bits": "4"}, "version 'gemm' with 4 bits"),
        ({"w_bit": 3}, "version 'gemm' with 3 bits"),
        ({"bits": True}, "version 'gemm' with True bits"),
        ({"version": "gemv"}, "version 'gemv' with 4 bits"),
        ({"version": 1}, "version '1' with 4 bits"),
        ({"group_size": 0}, "group size 0"),
        ({"group_size": 128.0}, "group size 128.0"),
        ({"sym": "yes"}, "symmetric must be true or false; found 'yes'"),
    ],
    ids=str,
)
def test_configs_that_are_not_read_are_refused(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        awq.schemes_of({"quant_method": "awq"} | changes, [NAME])
