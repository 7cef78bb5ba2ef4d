import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import run
from tiny import save_tiny

from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.core.config import METHODS, QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.settings import Tuned
from llmq.models.block_structure import split_packable
from llmq.models.model_source import ModelSource
from llmq.run.block_quantizer import Run
from llmq.runtime.load import load, load_any
from llmq.runtime.packed_linear import PackedLinear


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_holds_what_the_blocks_computed_with(name, method, tmp_path, text_file, monkeypatch):
    """bf16 source, biases, folded norms: every tensor in memory when a block is done comes back from disk."""
    computed = {}
    original = Run.quantize_block

    def spy(self, block, show):
        tensors = original(self, block, show)
        computed.update({f"{block.name}.{n}": t.clone() for n, t in block.module.state_dict().items()})
        return tensors

    monkeypatch.setattr(Run, "quantize_block", spy)
    source = save_tiny(tmp_path / "source", name, torch.bfloat16)
    blockwise = Tuned(steps=3, end_steps=0)
    # Without statistics nobody looks at what a block computes.
    options = {"tuned": blockwise} | ({"grid": "hessian"} if method == "rtn" else {})
    model = load(run(source, text_file, tmp_path / "out", method=method, bits=3, **options), device="cpu")
    state = model.state_dict()
    for tensor_name, expected in computed.items():
        module = model.get_submodule(tensor_name.rpartition(".")[0])
        is_packed = tensor_name.endswith(".weight") and tensor_name not in state
        found = module.dequantize() if is_packed else state[tensor_name]
        # In bfloat16 where that is what matmuls take.
        assert torch.equal(found.to(expected.dtype), expected), tensor_name
    assert len(computed) >= 18


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_methods_with_statistics_beat_rtn_on_held_out_tokens_on_average(bits, method, tmp_path, llama, text_file):
    report = json.loads((run(llama, text_file, tmp_path / "out", method=method, bits=bits) / REPORT).read_text())
    assert len(report["groups"]) == 3 * 4
    ratios = [group["error"] / group["rtn_error"] for group in report["groups"]]
    assert sum(ratios) / len(ratios) < 0.95


@pytest.mark.parametrize("method", ["gptq", "tuned"])
def test_a_block_without_groups_still_takes_the_original_model_along(method, tmp_path, llama, text_file, monkeypatch):
    """Or the next block would be held to what the original model has one block earlier."""
    monkeypatch.setattr("llmq.run.block_quantizer.split_packable", skipping_the_first(split_packable))
    settings = Tuned(steps=3, end_steps=0)
    output = run(llama, text_file, tmp_path / "out", bits=8, method=method, tuned=settings)
    drifts = json.loads((output / REPORT).read_text())["drifts"]
    assert drifts["model.layers.1"] < 1e-9  # nothing was rounded before it


def skipping_the_first(split):
    calls = []

    def skip(block, groups):
        calls.append(block)
        return split(block, groups) if len(calls) > 1 else ([], {})

    return skip


def test_the_report_tells_the_whole_story(tmp_path, llama, text_file):
    report = json.loads((run(llama, text_file, tmp_path / "out", group_size=128) / REPORT).read_text())
    assert set(report["seconds"]) >= {"total", "forward", "statistics", "solve", "write"}
    assert report["config"]["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["peak_memory_bytes"] > 1e8
    assert {"where": "model", "note": "group size 128 does not divide every layer: using 32"} in report["fallbacks"]
    for group in report["groups"]:
        assert group["damping"] == 0.05
        assert group["tokens"] == 18 * 32
        assert 0 < group["error"] < 1


@pytest.mark.parametrize("method", METHODS)
def test_the_same_request_gives_the_same_bytes(method, tmp_path, llama, text_file):
    first, second = (run(llama, text_file, tmp_path / str(i), method=method) for i in (1, 2))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_another_seed_gives_other_codes(tmp_path, llama, text_file):
    first, second = (run(llama, text_file, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


def test_linears_that_cannot_be_packed_stay_in_float_and_are_listed(tmp_path, text_file):
    source = save_tiny(tmp_path / "source", intermediate_size=80)
    output = run(source, text_file, tmp_path / "out")
    ignored = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    expected = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in ("gate_proj", "up_proj", "down_proj")]
    assert ignored == [*expected, "lm_head"]
    fallbacks = json.loads((output / REPORT).read_text())["fallbacks"]
    assert any("80x64" in entry["note"] for entry in fallbacks)
    assert load(output, device="cpu").model.layers[0].mlp.up_proj.weight.shape == (80, 64)


@torch.no_grad()
def distance(source, packed):
    """Relative difference of what two models' decoders give for tokens that neither was calibrated on."""
    ids = torch.randint(2, 300, (8, 64), generator=torch.Generator().manual_seed(9))
    original, other = (load_any(str(path), "cpu")[0].get_decoder()(ids).last_hidden_state for path in (source, packed))
    return float((other - original).norm() / original.norm())


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "phi3"])
def test_making_up_for_earlier_errors_brings_the_model_closer_to_the_original(name, tmp_path, text_file):
    source = save_tiny(tmp_path / "source", name)
    distances = {}
    for effort in ("fast", "normal"):
        output = run(source, text_file, tmp_path / effort, bits=4, effort=effort, samples=60)
        report = json.loads((output / REPORT).read_text())
        distances[effort] = distance(source, output)
        assert [group["matched"] for group in report["groups"][:1]] == [0.0]  # nothing differs before the first
        assert any(group["matched"] > 0 for group in report["groups"]) == (effort == "normal")
    assert distances["normal"] < 0.99 * distances["fast"]


def test_each_part_of_an_effort_can_be_left_out(tmp_path, llama, text_file):
    def codes(name, **changes):
        return (run(llama, text_file, tmp_path / name, **changes) / "model.safetensors").read_bytes()

    fast = codes("fast", effort="fast")
    assert codes("neither", without=("match", "sequential")) == fast
    assert len({fast, codes("both"), codes("sequential", without=("match",))}) == 3


def test_effort_best_reports_what_it_kept(tmp_path, llama, text_file):
    kept = {}
    for effort in ("normal", "best"):
        report = json.loads((run(llama, text_file, tmp_path / effort, effort=effort) / REPORT).read_text())
        kept[effort] = {step for group in report["groups"] for step in group["kept"]}
    assert kept == {"normal": set(), "best": {"descent", "scale refit"}}


@pytest.mark.parametrize("blocks", ["0", "1", "0,2", "1-2"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_blocks_that_are_not_chosen_keep_their_weights(method, blocks, tmp_path, llama, text_file):
    output = run(llama, text_file, tmp_path / "out", method=method, blocks=blocks)
    chosen = {"0": [0], "1": [1], "0,2": [0, 2], "1-2": [1, 2]}[blocks]
    model, original = load(output, device="cpu"), ModelSource(str(llama))
    for i, block in enumerate(model.model.layers):
        weight = block.mlp.up_proj
        assert isinstance(weight, PackedLinear) == (i in chosen)
        if i not in chosen:
            assert torch.equal(weight.weight, original.read(f"model.layers.{i}.mlp.up_proj.weight"))
    assert {int(name.split(".")[2]) for name in Checkpoint(output).linears} == set(chosen)


def test_blocks_before_the_chosen_ones_distort_nothing(tmp_path, llama, text_file):
    """What the first chosen block sees is the original model's, and it gets the codes it gets when it comes first."""
    report = json.loads((run(llama, text_file, tmp_path / "out", blocks="1-2") / REPORT).read_text())
    assert report["drifts"]["model.layers.1"] == 0
    assert report["drifts"]["model.layers.2"] > 0


def test_a_methods_blocks_may_be_any_numbers_and_ranges():
    config = QuantizeConfig(model="m", output=Path("o"), blocks="0-2, 5,1")
    assert config.chosen_blocks(6) == [0, 1, 2, 5]
    assert QuantizeConfig(model="m", output=Path("o")).chosen_blocks(3) == [0, 1, 2]
    for wrong in ("x", "3-1", "-1", "1-", "6", "1,,2"):
        with pytest.raises(RequestError, match="numbers and ranges"):
            replace(config, blocks=wrong).chosen_blocks(6)
