"""Packed mixtures that other tools wrote are loaded; those that do not fit their config.json are refused at once."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from hf_checkpoints import change_config, opened
from mixtures import Mixtures, become_act_order
from packed import dequantized_model, logits, rewrite, some_tokens

import llmq
from llmq.core.errors import CheckpointError
from llmq.verification.check import check

ROUTES = {"load": llmq.load, "transformers": opened, "check": lambda directory: check(directory, None)}
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1"


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    return Mixtures(tmp_path_factory.mktemp("mixtures"))


@pytest.fixture
def foreign(mixtures, tmp_path):
    return become_act_order(Path(shutil.copytree(mixtures("mixtral", format="gptq"), tmp_path / "packed")))


@pytest.fixture
def changed(mixtures, tmp_path):
    return Path(shutil.copytree(mixtures("mixtral"), tmp_path / "packed"))


def test_gptq_of_other_tools_is_loaded_through_either_door(mixtures, foreign):
    expected = logits(dequantized_model(mixtures.source("mixtral"), foreign), some_tokens())
    for model in (llmq.load(foreign, "cpu", torch.float32), opened(foreign, dtype=torch.float32)):
        torch.testing.assert_close(logits(model, some_tokens()), expected, rtol=0, atol=1e-5 * float(expected.std()))
    check(foreign, None)


@pytest.mark.parametrize("route", ROUTES)
def test_a_bias_that_the_experts_of_this_model_have_not_is_refused(foreign, route):
    rewrite(foreign, lambda tensors: tensors[f"{EXPERT}.bias"].fill_(1))
    with pytest.raises(CheckpointError, match=r"holds an unknown tensor .*experts\.1\.gate_proj\.bias"):
        ROUTES[route](foreign)


CONFIGS = {
    "more experts": ({"num_local_experts": 5}, r"lacks model\.layers\.0\.mlp\.experts\.4\.down_proj\.weight"),
    "fewer experts": ({"num_local_experts": 3}, r"experts\.3\.down_proj is packed, but the model has no such linear"),
    "no experts": ({"num_local_experts": 0}, r"experts\.0\.w1 is packed, but the model has no such linear"),
    "many small experts": ({"num_local_experts": 5000, "intermediate_size": 1}, r"describes 30000 linears of experts"),
    "wider experts": ({"intermediate_size": 96}, r"packed as \(\d+, \d+\), the model wants"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CONFIGS)
def test_experts_that_the_files_do_not_hold_are_refused_at_once(changed, case, route):
    entries, reason = CONFIGS[case]
    change_config(changed, lambda config: config.update(entries))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=reason) as error:
        ROUTES[route](changed)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 5


def without(tensors):
    for name in [name for name in tensors if name.startswith(f"{EXPERT}.")]:
        del tensors[name]


def square(tensors):
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        tensors[f"{EXPERT}.{part}"] = tensors[f"model.layers.0.self_attn.q_proj.{part}"].clone()


DAMAGE = {
    "lost": (without, r"lacks model\.layers\.0\.mlp\.experts\.1\.gate_proj\.weight"),
    "another shape": (square, r"experts\.1\.gate_proj: packed as \(64, 64\), the model wants \(128, 64\)"),
    "also dense": (
        lambda tensors: tensors.update({f"{EXPERT}.weight": torch.ones(128, 64)}),
        "holds an unknown tensor",
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_expert_is_refused(changed, case, route):
    change, reason = DAMAGE[case]
    rewrite(changed, change)
    with pytest.raises(CheckpointError, match=reason):
        ROUTES[route](changed)
