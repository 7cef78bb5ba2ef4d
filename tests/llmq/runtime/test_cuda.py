"""A tiny model on a GPU from end to end: quantized, resumed, loaded and continued as on a CPU."""

import json
from dataclasses import replace

import pytest
import torch
from killed import interrupted
from packed import logits, pack, some_tokens
from small_runs import small_config

import llmq
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.run import prepare

pytestmark = pytest.mark.gpu
# Relative error of logits whose activations are rounded to the dtype in each of about thirty layers and norms.
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def equal_codes(one, other):
    """Return the share of equal codes in two checkpoints of one model."""
    one, other = Checkpoint(one), Checkpoint(other)
    assert one.linears
    pairs = [(one.weight(name).q, other.weight(name).q) for name in one.linears]
    return sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def errors(directory):
    return torch.tensor([group["error"] for group in json.loads((directory / REPORT).read_text())["groups"]])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_loaded_model_has_the_logits_of_a_cpu_and_chooses_its_tokens(llama, tmp_path, dtype, merge):
    packed = pack(llama, tmp_path / "packed", format="gptq")
    here = llmq.load(packed, "cuda", dtype, merge=merge)
    exact = llmq.load(packed, "cpu", torch.float32)
    for ids in (some_tokens(1, 1), some_tokens(2, 40)):
        expected = logits(exact, ids)
        error = (logits(here, ids.to("cuda")).float().cpu() - expected).norm() / expected.norm()
        assert error < ROUNDING[dtype]
    ids = some_tokens(1, 10)
    captured = llmq.fast_generate(here, ids.to("cuda"), max_new_tokens=20, do_sample=False)
    assert captured.plain is None
    for written in (here.generate(ids.to("cuda"), max_new_tokens=20, do_sample=False), captured.sequences):
        assert written.shape[1] > ids.shape[1]
        # Each token is the CPU's first choice, or equal to it up to rounding.
        scores = logits(exact, written.cpu())[0, ids.shape[1] - 1 : -1]
        chosen = scores.gather(1, written.cpu()[0, ids.shape[1] :, None])[:, 0]
        assert bool((scores.amax(1) - chosen <= 4 * ROUNDING[dtype] * scores.std()).all())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_codes_of_a_block_are_those_of_a_cpu(llama, text_file, tmp_path, monkeypatch, method):
    # Only the first block: where two choices are equal up to rounding, all later blocks follow the one that was made.
    monkeypatch.setattr(prepare, "multiplies_bfloat16", lambda device: False)  # float32 in both places
    for device in ("cpu", "cuda"):
        config = small_config(llama, text_file, tmp_path / device, device=device, method=method, blocks="0")
        llmq.quantize(config)
    assert equal_codes(tmp_path / "cpu", tmp_path / "cuda") >= 0.99
    torch.testing.assert_close(errors(tmp_path / "cuda"), errors(tmp_path / "cpu"), rtol=0.02, atol=0)


@pytest.mark.parametrize("effort", ["normal", "best"])
def test_a_whole_model_is_quantized_as_well_as_on_a_cpu(llama, text_file, tmp_path, effort):
    for device in ("cpu", "cuda"):
        llmq.quantize(small_config(llama, text_file, tmp_path / device, device=device, effort=effort))
    here, there = (errors(tmp_path / device).mean() for device in ("cuda", "cpu"))
    torch.testing.assert_close(here, there, rtol=0.1, atol=0)


def test_an_interrupted_run_is_resumed(llama, text_file, tmp_path, monkeypatch):
    config = small_config(llama, text_file, tmp_path / "whole", device="cuda")
    llmq.quantize(config)
    resumed = replace(config, output=tmp_path / "resumed")
    interrupted(resumed, monkeypatch)
    assert not (resumed.output / "config.json").exists()
    llmq.quantize(replace(resumed, resume=True))
    assert json.loads((resumed.output / REPORT).read_text())["resumed"]
    torch.testing.assert_close(errors(resumed.output).mean(), errors(config.output).mean(), rtol=0.1, atol=0)
    llmq.load(resumed.output, "cuda")  # raises if a tensor is missing or wrong
