"""Conversion keeps every code, scale and zero point, or refuses."""

import itertools
import json

import pytest
import torch
from mixtures import Mixtures
from packed import logits, pack, some_tokens
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, RequestError
from llmq.formats import FORMATS, gptq
from llmq.run.convert import ConvertConfig, convert

# name -> options of `pack`
KINDS = {
    "compressed-tensors": {},
    "compressed-tensors 3 bit": {"bits": 3, "group_size": -1},
    "compressed-tensors asymmetric": {"symmetric": False},
    "compressed-tensors mixed": {"layer_bits": ("down_proj=8", "layers.0.*=2")},
    "compressed-tensors 5 and 6 bit": {"bits": 5, "layer_bits": ("down_proj=6",)},
    "gptq": {"format": "gptq"},
    "gptq mixed": {"format": "gptq", "bits": 2, "layer_bits": ("layers.1.mlp.*=3",)},
    "gptq v2": {"format": "gptq", "symmetric": False, "bits": 8},
    "awq": {"format": "awq"},
    "awq asymmetric": {"format": "awq", "symmetric": False},
    "mlx": {"format": "mlx"},
    "mlx mixed": {"format": "mlx", "layer_bits": ("down_proj=8", "layers.0.*=2")},
}
FOUR_BIT = [kind for kind, options in KINDS.items() if not {"bits", "layer_bits"} & options.keys()]
TAKEN = {
    "awq": FOUR_BIT,
    "gptq": [kind for kind, options in KINDS.items() if options.get("bits") != 5],
    "mlx": [kind for kind, options in KINDS.items() if not {"symmetric", "group_size"} & options.keys()],
}
"""The kinds that a format can store, if it cannot store all."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed checkpoints of a Qwen2 (biases, tied embeddings) by kind, made when first asked for."""
    root, made = tmp_path_factory.mktemp("packed"), {}

    def checkpoint(kind):
        if not made:
            save_tiny(root / "source", "qwen2", torch.bfloat16)
        if kind not in made:
            made[kind] = pack(root / "source", root / kind.replace(" ", "-"), **KINDS[kind])
        return made[kind]

    return checkpoint


def converted(directory, output, target):
    return convert(ConvertConfig(directory, output, target))


def assert_same_tensors(one, other):
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_weights(one, other):
    one, other = Checkpoint(one), Checkpoint(other)
    assert one.linears == other.linears
    for name in one.linears:
        ours, theirs = one.weight(name), other.weight(name)
        for part in ("q", "scale", "zero"):
            a, b = getattr(ours, part), getattr(theirs, part)
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        assert (ours.bits, one.schemes[name].group_size) == (theirs.bits, other.schemes[name].group_size)


@pytest.mark.parametrize(
    ("kind", "through"),
    [(k, f) for k, f in itertools.product(KINDS, FORMATS) if k in TAKEN.get(f, KINDS) and not k.startswith(f)],
)
def test_there_and_back_gives_the_same_bytes_and_nothing_is_lost_on_the_way(packed, tmp_path, kind, through):
    there = converted(packed(kind), tmp_path / "there", through)
    assert_same_weights(packed(kind), there)
    back = converted(there, tmp_path / "back", Checkpoint(packed(kind)).format.METHOD)
    assert_same_tensors(packed(kind), back)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (packed(kind), back)]
    # MLX needs an older entry for what rope_parameters says, too. It stays.
    older = {config.pop("rope_theta", None) for config in configs}
    assert older <= {None, configs[0]["rope_parameters"]["rope_theta"]}
    assert configs[0] == configs[1]


def test_only_who_gets_asymmetric_gptq_is_told_what_misreads_it(packed, tmp_path):
    told = []
    for kind, target in (("awq asymmetric", "gptq"), ("gptq v2", "compressed-tensors"), ("awq", "gptq")):
        convert(ConvertConfig(packed(kind), tmp_path / kind, target), tell=told.append)
    assert told == [f"note: {gptq.ASYMMETRIC_NOTE}"]


@pytest.mark.parametrize("target", FORMATS)
def test_the_converted_model_computes_the_same(packed, tmp_path, target):
    source = packed("awq" if target == "mlx" else "awq asymmetric")
    expected = logits(llmq.load(source, "cpu"), some_tokens())
    result = converted(source, tmp_path / "out", target)
    assert torch.equal(logits(llmq.load(result, "cpu"), some_tokens()), expected)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (result / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_mixture_keeps_its_bytes_through_mlx_whether_its_experts_are_stacked_there_or_not(tmp_path, name):
    mixtures = Mixtures(tmp_path)
    options = {"blocks": "1", "layer_bits": ("experts.*=2",)}  # the experts of the other block stay in float
    directory = mixtures(name, format="compressed-tensors", **options)
    there = converted(directory, tmp_path / "there", "mlx")
    assert any("switch_mlp" in tensor for tensor in load_file(there / "model.safetensors")) == (name == "qwen3_moe")
    assert_same_weights(directory, there)
    assert_same_tensors(converted(there, tmp_path / "back", "compressed-tensors"), directory)
    assert_same_tensors(mixtures(name, format="mlx", **options), there)


def change_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def test_zero_points_that_are_all_in_the_middle_become_symmetric(packed, tmp_path):
    """Other tools call every AWQ checkpoint asymmetric, for which the other formats would store zero points."""
    there = converted(packed("compressed-tensors"), tmp_path / "awq", "awq")
    change_config(there, lambda quantization: quantization.pop("sym"))
    assert not any(scheme.symmetric for scheme in Checkpoint(there).schemes.values())
    assert_same_tensors(converted(there, tmp_path / "back", "compressed-tensors"), packed("compressed-tensors"))


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        ("gptq v2", "awq", "4-bit"),
        ("compressed-tensors 3 bit", "awq", "4-bit"),
        ("compressed-tensors 5 and 6 bit", "gptq", "[56] bits per weight; gptq stores 2, 3, 4, 8"),
        ("compressed-tensors mixed", "awq", "one number of bits"),
        ("compressed-tensors 3 bit", "mlx", "groups of 32, 64, 128, not whole rows; quantize again with --group-size"),
        ("compressed-tensors asymmetric", "mlx", "-scale .* zero, which bfloat16 cannot hold"),
    ],
)
def test_what_a_format_cannot_say_is_refused_and_leaves_nothing(packed, tmp_path, kind, target, reason):
    with pytest.raises(CheckpointError, match=reason):
        converted(packed(kind), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "awq"])
def test_zero_points_that_are_no_codes_stay_mlx(llama, tmp_path, target):
    source = pack(llama, tmp_path / "packed", format="mlx", symmetric=False)
    with pytest.raises(CheckpointError, match="its zero points are no codes; only mlx stores such weights"):
        converted(source, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()
    again = converted(source, tmp_path / "again", "mlx")
    assert_same_tensors(again, source)
    assert torch.equal(*(logits(llmq.load(d, "cpu"), some_tokens()) for d in (again, source)))


@pytest.mark.parametrize("target", ["compressed-tensors", "awq", "mlx"])
def test_act_order_stays_gptq(act_order, tmp_path, target):
    with pytest.raises(CheckpointError, match="contiguous groups"):
        converted(act_order, tmp_path / "out", target)
    again = converted(act_order, tmp_path / "again", "gptq")
    assert_same_tensors(again, act_order)
    assert torch.equal(*(logits(llmq.load(d, "cpu"), some_tokens()) for d in (again, act_order)))


@pytest.fixture
def act_order(packed, tmp_path):
    """GPTQ whose groups are spread over the rows."""
    there = converted(packed("gptq"), tmp_path / "act-order", "gptq")
    tensors = load_file(there / "model.safetensors")
    shuffle = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("g_idx"):
            tensors[name] = tensor[torch.randperm(len(tensor), generator=shuffle)].clone()
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    change_config(there, lambda quantization: quantization.update(desc_act=True))
    return there


def test_bad_requests_are_refused_before_any_work(packed, tmp_path):
    with pytest.raises(RequestError, match="format must be one of"):
        ConvertConfig(packed("gptq"), tmp_path / "out", "marlin")
    with pytest.raises(RequestError, match="is not empty"):
        converted(packed("gptq"), packed("awq"), "awq")
    with pytest.raises(RequestError, match="the checkpoint's own"):
        convert(ConvertConfig(packed("gptq"), packed("gptq"), "awq", overwrite=True))
    with pytest.raises(CheckpointError, match="cannot be opened as a directory"):
        converted(tmp_path / "nowhere", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_converted(packed, tmp_path):
    damaged = converted(packed("gptq"), tmp_path / "damaged", "gptq")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        converted(damaged, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()
