"""The MLX format: against the words that mlx itself packs, against itself, and what its config says to readers."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import assert_same_weight, random_weight, with_real_zeros
from stored import DTYPES, LAYERS, NAME, check_missing_parts, check_refused, check_round_trip, sha

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import BITS, MLX_GROUPS
from llmq.formats import awq, compressed_tensors, format_of, gptq, method_of, mlx
from llmq.formats.scheme import Scheme

FOUR = Scheme(4, 32, False)

# What mlx.core.quantize(W, 32, bits) of mlx 0.32.4 returns for the float16 weights of `golden` (2026-11-29).
WORDS = {
    2: """
        1819044972 1819044972 1819044972 1819044972 358263804 1521221376 2885615644 4278195546
        4198753548 1139084948 3842938108 244644419
    """,
    3: """
        2561393592 3281562563 2881722539 2561393592 3281562563 2881722539 1925937144 3089142995
        2774897647 3742384248 3547515767 4021821588 669700152 2775084899 2687994259 516214776
        1663560400 2477090927
    """,
    4: """
        1392285424 3665043128 1392285232 3665043128 1392285424 3665043128 1392285232 3665043128
        3932635120 1159566690 4218634440 1362011683 209977840 1659877183 3449101802 1945880640
        1927121136 3144031431 1157277008 3632479897 1629255664 4199874742 871273551 3430034904
    """,
}
SHAS = {5: "6d9fa786763a681e", 6: "e8f34ff0d275b93d", 8: "6bd05fe286a47998"}
BIASES = {
    2: [[-0.125, 0.15625], [0.15625, -0.1875], [-0.1875, 0.21875]],
    3: [[-0.25, 0.3125], [0.3125, -0.375], [-0.375, 0.4375]],
    4: [[-0.5, 0.625], [0.625, -0.75], [-0.75, 0.875]],
    5: [[-1.0, 1.25], [1.25, -1.5], [-1.5, 1.75]],
    6: [[-2.0, 2.5], [2.5, -3.0], [-3.0, 3.5]],
    8: [[-8.0, 10.0], [10.0, -12.0], [-12.0, 14.0]],
}


def golden(bits):
    """Codes that use the whole range in each group of 32, so that mlx finds their own scales; half are negative."""
    o, i, g = torch.arange(3)[:, None], torch.arange(64), torch.arange(2)
    q = (7 * o + 3 * i + (o * i) % 5) % 2**bits
    q[:, ::32], q[:, 1::32] = 0, 2**bits - 1
    scale = (1 + ((o + g) % 4) / 4) / 16 * (1 - 2 * ((o + g) % 2))
    zero = torch.full((3, 2), 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedWeight(q.to(torch.uint8), scale.half(), zero, bits)


@pytest.mark.parametrize("bits", BITS)
def test_words_and_biases_are_those_of_mlx(bits):
    weight = golden(bits)
    tensors = mlx.encode(NAME, weight, Scheme(bits, 32, True))
    words = tensors[f"{NAME}.weight"]
    if bits in WORDS:
        assert words.flatten().tolist() == [int(word) for word in WORDS[bits].split()]
    else:
        assert sha(words.view(torch.int32)) == SHAS[bits]
    assert tensors[f"{NAME}.biases"].tolist() == BIASES[bits]
    assert torch.equal(tensors[f"{NAME}.scales"], weight.scale)
    assert_same_weight(mlx.decode(NAME, tensors, Scheme(bits, 32, False)), weight)


@pytest.mark.parametrize("bits", BITS)
def test_encode_writes_the_parts_of_the_format_in_their_dtypes(bits):
    tensors = mlx.encode(NAME, random_weight(24, 96, 3, bits, dtype=torch.bfloat16), Scheme(bits, 32, True))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        f"{NAME}.weight": (torch.uint32, (24, 3 * bits)),
        f"{NAME}.scales": (torch.bfloat16, (24, 3)),
        f"{NAME}.biases": (torch.bfloat16, (24, 3)),
    }
    assert set(tensors) == {f"{NAME}.{part}" for part in mlx.TENSOR_SUFFIXES}


@st.composite
def weights(draw):
    """A weight with its scheme, symmetric in any dtype; with zero points, whose scales leave room for the product."""
    bits, size, dtype = draw(st.sampled_from(BITS)), draw(st.sampled_from(MLX_GROUPS)), draw(st.sampled_from(DTYPES))
    rows, groups, symmetric = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.booleans())
    weight = random_weight(rows, size * groups, groups, bits, symmetric, dtype, draw(st.integers(0, 1000)))
    if not symmetric:  # float32 holds the product of 16 significant bits and 8
        weight = dataclasses.replace(weight, scale=weight.scale.bfloat16().float())
    return weight, Scheme(bits, size, symmetric)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_decode_gives_back_what_encode_was_given(drawn):
    weight, scheme = drawn
    check_round_trip(mlx, weight, scheme, dataclasses.replace(scheme, symmetric=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_times_code_plus_bias_is_what_the_weight_stands_for(dtype):
    weight = random_weight(16, 64, 2, 4, True, dtype)
    tensors = mlx.encode(NAME, weight, FOUR)
    scales, biases = (tensors[f"{NAME}.{part}"].double().repeat_interleave(32, 1) for part in ("scales", "biases"))
    assert torch.equal(scales * weight.q + biases, weight.dequantize(torch.float64))


def test_a_group_of_zeros_has_its_zero_point_in_the_middle():
    weight = random_weight(4, 64, 2)
    weight.scale[1, 1] = 0
    assert_same_weight(mlx.decode(NAME, mlx.encode(NAME, weight, FOUR), FOUR), weight)


def scaled(scale, dtype=torch.float16, zero=8):
    weight = random_weight(8, 64, 2, dtype=dtype)
    return dataclasses.replace(weight, scale=torch.full_like(weight.scale, scale), zero=weight.zero * 0 + zero)


UNSAYABLE = {
    "groups of 16": (random_weight(8, 64, 4), "mlx stores groups of 32, 64, 128, not 16; quantize .*--group-size 64"),
    "rows of 256": (random_weight(8, 256), "mlx stores groups of 32, 64, 128, not whole rows; .*--group-size 128"),
    "rows of 64, which could be said": (random_weight(8, 64), "mlx stores groups .* not whole rows; .*--group-size 64"),
    "48 inputs": (random_weight(8, 48), "mlx stores groups of 32, 64, 128, not whole rows; no other fits"),
    "act order": (
        dataclasses.replace(random_weight(8, 64, 2), group_of=torch.arange(64, dtype=torch.int32) % 2),
        "mlx stores contiguous groups",
    ),
    "a bias beyond float16": (scaled(9000), r"mlx stores -scale \* zero, which float16 cannot hold"),
    "3 bits more than float16 has": (scaled(0.1, zero=7), r"mlx stores -scale \* zero, which float16 cannot hold"),
    "3 bits more than bfloat16 has": (scaled(0.1, torch.bfloat16, 7), ".* which bfloat16 cannot hold"),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_the_format_cannot_say_is_refused_when_written(case):
    weight, reason = UNSAYABLE[case]
    with pytest.raises(CheckpointError, match=f"^{re.escape(NAME)}: {reason}"):
        mlx.encode(NAME, weight, FOUR)


@pytest.mark.parametrize("form", [awq, compressed_tensors, gptq])
def test_no_other_format_takes_zero_points_that_are_no_codes(form):
    weight = random_weight(32, 64, 2)
    real = with_real_zeros(weight)
    with pytest.raises(CheckpointError, match="its zero points are no codes; only mlx stores such weights"):
        form.encode(NAME, real, FOUR)


def test_sizes_are_known_without_numbers():
    weight = random_weight(8, 64, 2)
    empty = [part.to("meta") for part in (weight.q, weight.scale, weight.zero)]
    sizes = {name: t.nbytes for name, t in mlx.encode(NAME, QuantizedWeight(*empty, 4), FOUR).items()}
    assert sizes == {name: t.nbytes for name, t in mlx.encode(NAME, weight, FOUR).items()}


DAMAGE = {
    "words as int32": ("weight", lambda t: t.view(torch.int32)),
    "words as floats": ("weight", lambda t: t.float()),
    "words flat": ("weight", lambda t: t.flatten()),
    "no rows": ("weight", lambda t: t[:0]),
    "a word short": ("weight", lambda t: t[:, :-1]),
    "a row short": ("weight", lambda t: t[:-1]),
    "scales as integers": ("scales", lambda t: t.int()),
    "scales flat": ("scales", lambda t: t.flatten()),
    "scales of half the groups": ("scales", lambda t: t[:, ::2]),
    "scales transposed": ("scales", lambda t: t.T),
    "biases a row short": ("biases", lambda t: t[:-1]),
    "biases as float64": ("biases", lambda t: t.double()),
    "scales with a NaN": ("scales", lambda t: t.clone().fill_(float("nan"))),
    "scales with an infinity": ("scales", lambda t: t.clone().fill_(float("inf"))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_do_not_fit_are_refused(case):
    part, change = DAMAGE[case]
    tensors = mlx.encode(NAME, random_weight(24, 64, 2), FOUR)
    check_refused(mlx, {**tensors, f"{NAME}.{part}": change(tensors[f"{NAME}.{part}"])}, FOUR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 1.1,
        lambda t: -t,  # zero points of -8
        lambda t: t * 2,  # zero points of 16
        lambda t: t.clone().fill_(0.3),
        lambda t: t.clone().index_fill_(0, torch.tensor([3]), 0.03),
    ],
)
def test_biases_that_are_no_whole_zero_points_are_read_as_they_are_and_written_again(change, dtype):
    tensors = mlx.encode(NAME, random_weight(24, 64, 2, dtype=dtype), FOUR)
    biases = tensors[f"{NAME}.biases"] = change(tensors[f"{NAME}.biases"])
    weight = mlx.decode(NAME, tensors, FOUR)
    assert weight.has_real_zeros
    scale, bias = (each.double().repeat_interleave(32, 1) for each in (weight.scale, biases))
    torch.testing.assert_close(weight.dequantize(torch.float64), scale * weight.q + bias, rtol=1e-15, atol=1e-15)
    again = mlx.encode(NAME, weight, FOUR)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_biases_that_are_not_finite_are_refused(value):
    tensors = mlx.encode(NAME, random_weight(24, 64, 2), FOUR)
    tensors[f"{NAME}.biases"][3, 1] = value
    check_refused(mlx, tensors, FOUR, "a zero point is not finite")


def test_a_bias_without_a_scale_is_refused():
    weight = random_weight(4, 64, 2)
    weight.scale[1, 1] = 0
    tensors = mlx.encode(NAME, weight, FOUR)
    tensors[f"{NAME}.biases"][1, 1] = 1
    check_refused(mlx, tensors, FOUR, "a scale is 0 beside a bias that is not")


def test_a_linear_that_lacks_any_of_its_parts_is_refused():
    check_missing_parts(mlx, mlx.encode(NAME, golden(4), FOUR), FOUR)


@pytest.mark.parametrize("scheme", [Scheme(4, 128, False), Scheme(8, 64, False), Scheme(2, 32, False)])
def test_a_scheme_that_is_not_the_tensors_is_refused(scheme):
    check_refused(mlx, mlx.encode(NAME, golden(4), FOUR), scheme)


def test_layers_that_differ_have_entries_of_their_own():
    schemes = dict.fromkeys(LAYERS, Scheme(4, 64, True)) | {NAME: Scheme(2, 64, True)}
    config = mlx.hf_config(schemes, ["lm_head"])
    assert config == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        NAME: {"group_size": 64, "bits": 2, "mode": "affine"},
    }
    found = mlx.schemes_of(config, LAYERS)
    assert found == {name: dataclasses.replace(scheme, symmetric=False) for name, scheme in schemes.items()}
    assert method_of(config) == "mlx"
    assert format_of(config) is mlx


def test_experts_share_an_entry_under_the_name_that_they_have_in_mlx():
    experts = [f"model.layers.0.block_sparse_moe.experts.{i}.{leaf}" for i in range(3) for leaf in ("w1", "w2", "w3")]
    schemes = dict.fromkeys(LAYERS, Scheme(4, 64, False)) | dict.fromkeys(experts, Scheme(2, 64, False))
    config = mlx.hf_config(schemes, [])
    module = "model.layers.0.block_sparse_moe.switch_mlp"
    assert config.keys() - {"group_size", "bits", "mode"} == {
        f"{module}.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert mlx.schemes_of(config, schemes) == schemes
    as_in_dots1 = {name.replace("switch_mlp", "experts"): entry for name, entry in config.items()}
    assert mlx.schemes_of(as_in_dots1, schemes) == schemes


def test_the_names_of_stacks_and_their_parts_lead_to_each_other():
    parts = [f"model.layers.3.mlp.experts.{i}.up_proj.{part}" for i in (0, 11) for part in mlx.TENSOR_SUFFIXES]
    for name in parts:
        stack, number = mlx.stack_of(name)
        assert stack == f"model.layers.3.mlp.switch_mlp.up_proj.{name.rpartition('.')[2]}"
        assert str(number).join(mlx.in_stack(stack)) == name
        assert str(number).join(mlx.in_stack(stack.replace("switch_mlp", "experts"))) == name  # as in AFMoE and dots1
    for name in (
        f"{NAME}.weight",
        f"a.experts.{'1' * 5000}.b.weight",
        "model.layers.3.mlp.experts.0.up_proj.bias",
        "model.layers.3.mlp.gate.weight",
    ):
        assert mlx.stack_of(name) is None
        assert mlx.in_stack(name) is None


@pytest.mark.parametrize(("model_type", "is_stacked"), [("qwen3_moe", True), ("mixtral", False)])
def test_experts_are_stacked_only_where_mlx_lm_does_not(model_type, is_stacked):
    parts = {f"a.experts.{i}.up_proj.{part}": torch.full((2, 3), i) for i in (10, 9) for part in mlx.TENSOR_SUFFIXES}
    found = mlx.stacked({"b.weight": torch.zeros(1), **parts}, model_type)
    whole = {f"a.switch_mlp.up_proj.{part}" for part in mlx.TENSOR_SUFFIXES}
    assert found.keys() == {"b.weight", *(whole if is_stacked else parts)}
    assert all(found[name][:, 0, 0].tolist() == [9, 10] for name in whole & found.keys())


ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
        ({"rope_parameters": ROPE}, {"rope_theta": 5e5, "rope_scaling": ROPE}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {}),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, {}),
        ({"rope_scaling": None}, {}),
    ],
)
def test_rotary_frequencies_are_where_each_version_of_transformers_wrote_them(config, added):
    settings = {"bits": 4, "group_size": 64}
    assert mlx.with_settings(config, settings) == config | added | {"quantization": settings}
    nested = mlx.with_settings({"text_config": config}, settings)
    assert nested == {"text_config": config | added, "quantization": settings}


# configs of mlx_lm -> what they say of a linear
CONFIGS = {
    "before modes": ({"group_size": 64, "bits": 4}, Scheme(4, 64, False)),
    "a layer of its own": (
        {"group_size": 64, "bits": 4, NAME: {"group_size": 32, "bits": 8}},
        Scheme(8, 32, False),
    ),
    "a layer like the others": ({"group_size": 64, "bits": 4, "mode": "affine", NAME: True}, Scheme(4, 64, False)),
    "MLX's defaults in a layer": ({"group_size": 32, "bits": 8, NAME: {"mode": "affine"}}, Scheme(4, 64, False)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_of_mlx_lm_are_read(case):
    config, scheme = CONFIGS[case]
    assert mlx.schemes_of(config, [NAME]) == {NAME: scheme}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "mxfp4"}, "mlx: of MLX's modes llmq reads affine; found .*mxfp4"),
        ({"bits": 7}, "7 bits per weight"),
        ({"bits": "4"}, "'4' bits per weight"),
        ({"group_size": 16}, "mlx: MLX has groups of 32, 64, 128; its config says 16"),
        ({"group_size": -1}, "its config says -1"),
        ({"group_size": 64.0}, "group size 64.0"),
        ({NAME: False}, f"{NAME} is packed, although the config leaves it in float"),
        ({NAME: {"group_size": 32, "bits": 4, "mode": "nvfp4"}}, f"{NAME}: of MLX's modes"),
        ({NAME: [4]}, f"{NAME}: of MLX's modes"),
        ({NAME: None}, f"{NAME}: of MLX's modes"),
        ({NAME: {"bits": 1}}, "1 bits per weight"),
    ],
    ids=str,
)
def test_configs_that_are_not_read_are_refused(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        mlx.schemes_of({"group_size": 64, "bits": 4} | changes, [NAME])
