"""A block computes with the weights that are written, and a group's memory is freed when it is solved."""

import json
import weakref

import pytest
import torch
from architectures.tiny_models import save_tiny as save_tiny_of_kind
from packed import dequantized_model, logits, some_tokens
from small_runs import run
from tiny import save_tiny

from llmq.checkpoint.output_dir import REPORT
from llmq.core.errors import RequestError
from llmq.core.settings import Tuned
from llmq.formats import gptq
from llmq.run import block_quantizer
from llmq.run.block_quantizer import Run
from llmq.run.layer_problem import packable_groups
from llmq.runtime.load import load


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("llama-gqa", "awq"), ("qwen2", "awq"), ("gemma2", "awq"), ("phi3", "awq")),  # what is folded differs
        *(("phi3", "gptq"), ("gemma2", "awq+gptq"), ("qwen2", "tuned"), ("llama-gqa", "rtn")),
    ],
)
def test_the_checkpoint_holds_what_the_blocks_computed_with(name, method, tmp_path, text_file, monkeypatch):
    """bf16 source, biases, folded norms: every tensor in memory when a block is done comes back from disk."""
    computed = {}
    original = Run.quantize_block

    def spy(self, block, show):
        yield from original(self, block, show)
        computed.update({f"{block.name}.{n}": t.clone() for n, t in block.module.state_dict().items()})

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
    assert len(computed) >= 12


@pytest.mark.parametrize("method", ["gptq", "tuned"])
def test_a_block_without_groups_still_takes_the_original_model_along(method, tmp_path, llama, text_file, monkeypatch):
    """Or the next block would be held to what the original model has one block earlier."""
    monkeypatch.setattr("llmq.run.block_quantizer.packable_groups", skipping_the_first(packable_groups))
    settings = Tuned(steps=3, end_steps=0)
    output = run(llama, text_file, tmp_path / "out", bits=8, method=method, tuned=settings)
    drifts = json.loads((output / REPORT).read_text())["drifts"]
    assert drifts["model.layers.1"] < 1e-9  # nothing was rounded before it


def skipping_the_first(split):
    calls = []

    def skip(block, *rest):
        calls.append(block)
        return split(block, *rest) if len(calls) > 1 else ([], {})

    return skip


def test_linears_that_cannot_be_packed_stay_in_float_and_are_listed(tmp_path, text_file):
    source = save_tiny(tmp_path / "source", intermediate_size=80)
    output = run(source, text_file, tmp_path / "out")
    ignored = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    expected = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
    assert ignored == [*expected, "lm_head"]
    notes = json.loads((output / REPORT).read_text())["notes"]
    assert any("80x64" in entry["note"] for entry in notes)
    assert load(output, device="cpu").model.layers[0].mlp.up_proj.weight.shape == (80, 64)


@pytest.mark.parametrize(
    ("stored_as", "bits", "symmetric"),
    [("compressed-tensors", 4, True), ("compressed-tensors", 8, False), ("gptq", 4, False), ("awq", 4, False)],
)
def test_rows_that_are_multiples_of_eight_are_packed_and_run(stored_as, bits, symmetric, tmp_path, text_file):
    """As in_proj of Falcon-H1-0.5B, which has 3352. Here up_proj is alone, so its group has no multiple of 16 rows."""
    source = save_tiny(tmp_path / "source", "arcee", intermediate_size=264)
    output = run(source, text_file, tmp_path / "out", format=stored_as, bits=bits, symmetric=symmetric)
    model = load(output, device="cpu")
    assert model.model.layers[0].mlp.up_proj.extra_repr() == f"in=64, out=264, bits={bits}, group=32"
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)  # its inputs fill no groups of 32
    expected, ids = dequantized_model(source, output), some_tokens()
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "effort"), [("gptq", "normal"), ("awq", "fast")])
def test_statistics_of_a_stage_are_freed_before_those_of_the_next_are_summed(
    method, effort, tmp_path, llama, text_file, monkeypatch
):
    alive, stages = [], []
    collect = block_quantizer.collect_statistics

    def spy(block, groups, *arguments):
        stages.append([moment() for moment in alive if moment() is not None])
        statistics = collect(block, groups, *arguments)
        alive.extend(weakref.ref(each.H) for each in statistics)
        return statistics

    monkeypatch.setattr(block_quantizer, "collect_statistics", spy)
    run(llama, text_file, tmp_path / "out", method=method, effort=effort)
    assert len(stages) == 2 * (1 if effort == "fast" else 4)
    assert len(alive) == 2 * 4
    assert not any(stages)


def test_linears_that_share_an_input_need_the_same_bits(llama, text_file, tmp_path, monkeypatch):
    """Names alone do not tell in every model; a run of the block does."""
    monkeypatch.setattr("llmq.run.layer_bits.SIBLINGS", ())
    with pytest.raises(RequestError, match=r"self_attn.q_proj, .* share an input .*; give all the same bits"):
        run(llama, text_file, tmp_path / "out", layer_bits=("q_proj=8",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("symmetric", [True, False])
def test_only_who_gets_asymmetric_gptq_is_told_what_misreads_it(symmetric, llama, text_file, tmp_path):
    output = run(llama, text_file, tmp_path / "out", method="rtn", format="gptq", symmetric=symmetric)
    note = {"where": "model", "note": gptq.ASYMMETRIC_NOTE}
    assert (note in json.loads((output / REPORT).read_text())["notes"]) is not symmetric


@pytest.mark.parametrize(
    ("method", "note"),
    [("awq", "awq scales no inputs of experts"), ("tuned", "the training of single blocks leaves experts as they are")],
)
def test_what_a_method_does_not_do_for_experts_is_told(method, note, tmp_path, text_file):
    save_tiny_of_kind("mixtral", tmp_path / "source")
    settings = Tuned(steps=2, end_steps=0)
    report = json.loads(
        (run(tmp_path / "source", text_file, tmp_path / "out", method=method, tuned=settings) / REPORT).read_text()
    )
    assert {"where": "model", "note": note} in report["notes"]
    assert report["packed_share"] == 1
