"""The loss of a unit is what a model loses whose other weights are the original ones."""

import math
from dataclasses import replace

import pytest
import torch
from architectures import tiny_models
from small_runs import small_config

import llmq
from llmq.core.device import full_float32
from llmq.core.distributed import ALONE
from llmq.core.errors import WorkError
from llmq.models.model_source import ModelSource
from llmq.run import sensitivity
from llmq.run.block_quantizer import Run
from llmq.run.prepare import open_request
from llmq.run.sensitivity import measure
from llmq.runtime.load import load


@torch.no_grad()
def measured(config, monkeypatch=None, **constants):
    """The units of a model, the tokens that the loss was measured on, and those of the moments."""
    for name, value in constants.items():
        monkeypatch.setattr(sensitivity, name, value)
    with full_float32():
        request = open_request(config, torch.device("cpu"), ALONE, progress=False)
        run = Run(config, request.source, request.compute.device, request.clock)
        return measure(request, run), sensitivity._pieces(request.tokens)


def kl_of(directory, source, chunks):
    """Mean KL over all positions."""
    original = ModelSource(str(source)).load_all(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        given, wanted = (m(chunks).logits.log_softmax(-1) for m in (load(directory, "cpu"), original))
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_it_is_what_a_run_loses_that_rounds_this_unit_alone(effort, deep_llama, text_file, tmp_path, monkeypatch):
    """In the run the layers after it are rounded to 8 bits, which costs next to nothing."""
    config = small_config(deep_llama, text_file, tmp_path / "out", effort=effort, budget=3.7)
    units, tokens = measured(config, monkeypatch, _SCORED=10**9)
    bits = [f"{name}=3" for name in units[4].linears]
    assert bits == [f"model.layers.1.self_attn.{name}_proj=3" for name in "qkv"]
    alone = replace(config, budget=0.0, bits=8, layer_bits=tuple(bits), blocks="1")
    assert units[4].loss == pytest.approx(kl_of(llmq.quantize(alone), deep_llama, tokens.held_out), rel=0.05)


def test_the_layers_after_it_make_up_for_it_if_they_do_in_the_run(deep_llama, text_file, tmp_path):
    config = small_config(deep_llama, text_file, tmp_path / "out", budget=3.7, samples=60)
    fast, normal = (measured(replace(config, effort=effort))[0] for effort in ("fast", "normal"))
    before_others = [i for i, unit in enumerate(fast) if not unit.linears[0].endswith("down_proj")]
    assert sum(normal[i].loss for i in before_others) < 0.95 * sum(fast[i].loss for i in before_others)
    assert [normal[i].loss for i in range(12) if i not in before_others] == [
        fast[i].loss for i in range(12) if i not in before_others
    ]


def test_blocks_that_are_not_chosen_have_no_units(deep_llama, text_file, tmp_path):
    units, _ = measured(small_config(deep_llama, text_file, tmp_path / "out", budget=3.7, blocks="1"))
    assert {unit.linears[0].split(".")[2] for unit in units} == {"1"}
    assert len(units) == 4


def test_weights_are_the_original_ones_again_after_each_unit(deep_llama, text_file, tmp_path):
    """So the units of the last block do not depend on whether earlier blocks were measured."""
    config = small_config(deep_llama, text_file, tmp_path / "out", budget=3.7)
    whole, last = measured(config)[0], measured(replace(config, blocks="2"))[0]
    assert whole[-4:] == last


def test_most_blocks_of_a_deep_model_are_interpolated_on_a_log_scale(deep_llama, text_file, tmp_path, monkeypatch):
    config = small_config(deep_llama, text_file, tmp_path / "out", budget=3.7)
    every, _ = measured(config)
    monkeypatch.setattr(sensitivity, "measured_blocks", lambda run: {run.chosen[0], run.chosen[2]})
    some, _ = measured(config)
    assert [unit.is_measured for unit in some] == [True] * 4 + [False] * 4 + [True] * 4
    assert [some[i] for i in (*range(4), *range(8, 12))] == [every[i] for i in (*range(4), *range(8, 12))]
    for i in range(4, 8):
        assert some[i].loss == pytest.approx(math.sqrt(every[i - 4].loss * every[i + 4].loss), rel=1e-6)
        assert some[i].linears == every[i].linears


def test_outside_of_the_measured_blocks_the_nearest_one_counts(deep_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "measured_blocks", lambda run: {run.chosen[1]})
    units, _ = measured(small_config(deep_llama, text_file, tmp_path / "out", budget=3.7))
    assert [unit.loss for unit in units] == [unit.loss for unit in units[4:8]] * 3


def test_all_experts_of_a_block_are_one_unit(text_file, tmp_path):
    tiny_models.save_tiny("qwen3_moe", tmp_path / "model")
    units, _ = measured(small_config(tmp_path / "model", text_file, tmp_path / "out", budget=3.7))
    experts = [unit for unit in units if ".experts." in unit.linears[0]]
    assert len(experts) == len(ModelSource(str(tmp_path / "model")).block_names)
    assert all(unit.loss > 0 for unit in units)
    assert len({name.rpartition(".")[2] for name in experts[0].linears}) == 3


def test_a_loss_that_is_not_finite_ends_the_run(deep_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "divergence", lambda *_: torch.tensor(math.nan))
    with pytest.raises(WorkError, match="not finite"):
        measured(small_config(deep_llama, text_file, tmp_path / "out", budget=3.7))


@pytest.mark.parametrize("kind", ["gemma3n_text", "qwen3_5_text", "gpt_oss", "mamba2", "zamba2"])
def test_blocks_that_share_more_than_hidden_states_and_experts_are_measured(kind, text_file, tmp_path):
    tiny_models.save_tiny(kind, tmp_path / "model")
    units, _ = measured(small_config(tmp_path / "model", text_file, tmp_path / "out", budget=3.7))
    assert units
    assert all(0 <= unit.loss < 2 for unit in units)
    assert sum(unit.loss > 0 for unit in units) > len(units) / 2


def test_linears_that_the_text_does_not_run_have_no_loss_and_are_one_unit_if_engines_fuse_them(text_file, tmp_path):
    tiny_models.save_tiny("mllama@image", tmp_path / "model")
    units, _ = measured(small_config(tmp_path / "model", text_file, tmp_path / "out", budget=5.0))
    unseen = [unit for unit in units if unit.loss is None]
    assert all("cross_attn" in unit.linears[0] or "mlp" in unit.linears[0] for unit in unseen)
    assert any(len(unit.linears) == 3 and unit.linears[0].endswith("q_proj") for unit in unseen)
    assert not any(unit.is_measured for unit in unseen)


def test_a_run_with_more_text_than_the_measurement_loses_less():
    assert [sensitivity._factor(text) for text in (0.5, 1.0)] == [1.0, 1.0]
    assert sensitivity._factor(29696 / 8192) == pytest.approx(0.258 / 0.326)
    assert sensitivity._factor(100.0) == sensitivity._factor(4.0)
