"""What transformers would open with random weights, or save as something else, llmq refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from hf_checkpoints import NORM, ROUTES, change_config, make_checkpoints, opened, regrouped
from packed import random_weight, rewrite
from transformers import AutoConfig, Qwen2ForCausalLM

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, RequestError
from llmq.formats.scheme import Scheme
from llmq.runtime.packed_linear import PackedLinear

LINEAR = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(checkpoints("compressed-tensors"), tmp_path / "packed"))


DAMAGE = {
    "a missing norm": (f"lacks {NORM}", lambda t: t.pop(NORM)),
    "a missing bias": (f"lacks {LINEAR}.bias", lambda t: t.pop(f"{LINEAR}.bias")),
    "missing scales": (f"{LINEAR}.weight_scale is missing", lambda t: t.pop(f"{LINEAR}.weight_scale")),
    "missing codes": (f"lacks {LINEAR}.weight", lambda t: t.pop(f"{LINEAR}.weight_packed")),
    "a long norm": (NORM, lambda t: t.update({NORM: torch.ones(65)})),
    "a short bias": (f"{LINEAR}.bias", lambda t: t.update({f"{LINEAR}.bias": torch.ones(63)})),
    "codes cut": (f"{LINEAR}.weight_packed", lambda t: t.update({f"{LINEAR}.weight_packed": t[NORM].int()[None]})),
    "NaN scales": ("a scale is not finite", lambda t: t[f"{LINEAR}.weight_scale"].fill_(float("nan"))),
    "a stranger": ("unknown tensor model.norm.odd", lambda t: t.update({"model.norm.odd": torch.ones(1)})),
    "a dense copy": (f"unknown tensor {LINEAR}.weight", lambda t: t.update({f"{LINEAR}.weight": torch.ones(64, 64)})),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_transformers_would_only_warn_about_is_refused(damaged, case):
    reason, change = DAMAGE[case]
    rewrite(damaged, change)
    for route in (llmq.load, opened, lambda directory: opened(directory, ignore_mismatched_sizes=True)):
        with pytest.raises(CheckpointError, match=reason):
            route(damaged)


def test_a_packed_head_that_the_model_ties_is_refused(damaged):
    head = random_weight(384, 64, 2)
    tensors = Checkpoint(damaged).format.encode("lm_head", head, Scheme(4, 32, True))
    rewrite(damaged, lambda stored: stored.update(tensors))
    change_config(damaged, lambda config: config["quantization_config"].update(ignore=[]))
    for route in ROUTES.values():
        with pytest.raises(CheckpointError, match="lm_head is packed, but the model ties it"):
            route(damaged)


def test_a_model_of_another_size_is_refused(damaged):
    change_config(damaged, lambda config: config.update(intermediate_size=128))
    with pytest.raises(CheckpointError, match=r"packed as \(96, 64\)|packed as \(64, 96\)"):
        opened(damaged)


def test_an_original_model_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match="not a quantized checkpoint"):
        opened(checkpoints.source)


def test_tensors_without_a_directory_are_refused(checkpoints):
    config = AutoConfig.from_pretrained(checkpoints("gptq"))
    config.quantization_config = {"quant_method": "llmq"}
    with pytest.raises(RequestError, match="from files"):
        Qwen2ForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_tensors_in_the_place_of_others_are_refused(checkpoints):
    mapping = {"layers.1.input_layernorm": "layers.0.input_layernorm"}
    with pytest.raises(CheckpointError, match=r"did not load model.layers.[01].input_layernorm.weight"):
        opened(checkpoints("gptq"), key_mapping=mapping)


def test_weights_are_not_offloaded_to_disk(checkpoints, tmp_path):
    places = {"model": "cpu", "lm_head": "cpu", "model.layers.1": "disk"}
    with pytest.raises(RequestError, match="not offloaded"):
        opened(checkpoints("gptq"), device_map=places, offload_folder=tmp_path)


def test_a_merged_model_refuses_to_be_saved(checkpoints, tmp_path):
    model = llmq.load(checkpoints("compressed-tensors"), "cpu", merge=True)
    with pytest.raises(RequestError, match=r"gate_proj has become a MergedSibling.*merge=True"):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.glob("saved/*")) == []


@pytest.mark.parametrize(
    "weight",
    [
        random_weight(48, 96, 3, symmetric=False, dtype=torch.float32),
        regrouped(random_weight(48, 96, 3), [48, 48, 0]),
    ],
    ids=["float32 beside zero points", "a group without inputs"],
)
def test_codes_that_were_kept_rounded_are_not_given_back(weight):
    with pytest.raises(RequestError, match="keep neither float32 scales beside zero points nor groups without inputs"):
        PackedLinear.from_codes(weight).codes()


def test_what_cannot_be_saved_exactly_is_named(checkpoints, tmp_path):
    directory = Path(shutil.copytree(checkpoints("gptq_v2"), tmp_path / "packed"))
    wide = f"{LINEAR}.scales"
    rewrite(directory, lambda tensors: tensors.update({wide: tensors[wide].float() * 1.0001}))
    for route in ROUTES.values():
        with pytest.raises(RequestError, match=f"{LINEAR} cannot be saved as it was read: .* float32 scales"):
            route(directory).save_pretrained(tmp_path / "saved")
