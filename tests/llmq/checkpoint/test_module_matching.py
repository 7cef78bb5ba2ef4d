"""Every tensor of a checkpoint is matched with a module of the model, or refused by its name."""

import shutil

import pytest
import torch
from fake_gpu import GPU, FakeGpu, OnGpu
from packed import pack, rewrite
from tiny import save_tiny
from torch import nn

from llmq.checkpoint.module_matching import check_fit, is_harmless, packed_target, read_linear, replace_linears
from llmq.checkpoint.reader import CPU, Checkpoint
from llmq.core.errors import CheckpointError
from llmq.models.model_source import build_skeleton
from llmq.runtime.model_config import model_config

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    source = save_tiny(tmp_path_factory.mktemp("source"), "qwen2")  # with biases and tied embeddings
    return pack(source, tmp_path_factory.mktemp("sound") / "packed")


def opened(directory):
    checkpoint = Checkpoint(directory)
    return build_skeleton(model_config(checkpoint)), checkpoint


@pytest.fixture
def changed(sound, tmp_path):
    """Copies a checkpoint, changes its tensors, and returns its skeleton and itself."""

    def change(how):
        directory = shutil.copytree(sound, tmp_path / "packed")
        rewrite(directory, how)
        return opened(directory)

    return change


def test_a_checkpoint_that_fits_holds_all_tensors_but_tied_ones(sound):
    model, checkpoint = opened(sound)
    packed = {f"{name}.weight" for name in checkpoint.linears}
    assert check_fit(model, checkpoint) == set(model.state_dict()) - packed - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight; it does not belong to this model"),
        (lambda t: t.update({"model.norm.surprise": torch.ones(4)}), r"holds an unknown tensor model\.norm\.surprise"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            r"weight is \(63,\), the model wants \(64,\)",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), "does not hold floating-point numbers"),
    ],
    ids=["missing", "unknown", "shape", "integers"],
)
def test_tensors_that_do_not_fit_are_refused_by_their_name(how, said, changed):
    with pytest.raises(CheckpointError, match=said):
        check_fit(*changed(how))


def test_tensors_that_no_part_of_the_model_could_use_are_no_reason_to_refuse_it(changed):
    check_fit(
        *changed(lambda t: t.update({"score.weight": torch.ones(2, 64), "mtp.layers.0.norm.weight": torch.ones(64)}))
    )


def test_tied_tensors_may_be_stored_twice(changed):
    check_fit(*changed(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})))


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("model.layers.0.mlp.up_proj.bias", torch.zeros(96), True),
        ("model.layers.0.mlp.up_proj.bias", torch.ones(96), False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8), True),
        ("model.layers.0.input_layernorm.bias", torch.zeros(64), False),
    ],
)
def test_zero_biases_of_linears_without_bias_and_rotary_frequencies_are_harmless(name, value, harmless, changed):
    model, checkpoint = changed(lambda t: t.update({name: value}))
    assert is_harmless(checkpoint, model, name) == harmless


def test_a_bias_that_the_model_adds_is_not_harmless(sound):
    model, checkpoint = opened(sound)
    assert not is_harmless(checkpoint, model, f"{Q}.bias")


@pytest.mark.parametrize(("name", "said"), [("model.norm", "no such linear"), ("lm_head", "ties it to its embeddings")])
def test_a_packed_weight_needs_a_linear_of_its_own(name, said, sound):
    with pytest.raises(CheckpointError, match=said):
        packed_target(*opened(sound), name)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: t.update({f"{Q}.bias": torch.zeros(63)}), r"\(63,\) fits no 64 outputs"),
        (lambda t: t.update({f"{Q}.bias": torch.zeros(64).int()}), "int32 .* fits no 64 outputs"),
        (
            lambda t: t.update(
                {f"{Q}.{suffix}": t[f"{Q}.{suffix}"][:32].clone() for suffix in ("weight_packed", "weight_scale")}
                | {f"{Q}.weight_shape": torch.tensor([32, 64])}
            ),
            r"packed as \(32, 64\), the model wants \(64, 64\)",
        ),
    ],
    ids=["bias", "bias of integers", "weight"],
)
def test_a_weight_or_bias_of_another_shape_is_refused(how, said, changed):
    with pytest.raises(CheckpointError, match=said):
        read_linear(*changed(how), Q)


def test_each_packed_linear_is_replaced_by_the_module_made_of_it(sound):
    model, checkpoint = opened(sound)
    made = {}

    def make(name, weight, bias):
        assert torch.equal(weight.q, checkpoint.weight(name).q)
        assert (bias is None) == (not name.endswith(("q_proj", "k_proj", "v_proj")))
        made[name] = nn.Identity()
        return made[name]

    replace_linears(model, checkpoint, make, lambda _: CPU)
    assert sorted(made) == checkpoint.linears
    assert all(model.get_submodule(name) is module for name, module in made.items())


def test_linears_are_decoded_on_the_devices_that_they_go_to(sound):
    model, checkpoint = opened(sound)
    on_gpu = {}

    def make(name, weight, bias):
        tensors = [weight.q, weight.scale, weight.zero] + ([] if bias is None else [bias])
        on_gpu[name] = {isinstance(tensor, OnGpu) for tensor in tensors}
        return nn.Identity()

    with FakeGpu():
        replace_linears(model, checkpoint, make, lambda name: GPU if name == Q else CPU)
    assert on_gpu == {name: {name == Q} for name in checkpoint.linears}
