"""A tiny model on a GPU from end to end: quantized, resumed, loaded and continued as on a CPU."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from killed import interrupted
from packed import logits, pack, some_tokens
from small_runs import small_config
from tiny import save_tiny

import llmq
from llmq.calibration.products import add_lower, mirrored
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.core.settings import Tuned
from llmq.plan import workload
from llmq.run.block_quantizer import Run

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
    monkeypatch.setattr("llmq.core.device.multiplies_bfloat16", lambda device: False)  # float32 in both places
    for device in ("cpu", "cuda"):
        config = small_config(llama, text_file, tmp_path / device, device=device, method=method, blocks="0")
        llmq.quantize(config)
    assert equal_codes(tmp_path / "cpu", tmp_path / "cuda") >= 0.99
    torch.testing.assert_close(errors(tmp_path / "cuda"), errors(tmp_path / "cpu"), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "best"},
        {"symmetric": False},
        {"method": "awq+gptq"},
        {"method": "rtn", "grid": "hessian"},
        {"method": "tuned", "tuned": Tuned(steps=5, end_steps=5)},
    ],
    ids=str,
)
def test_a_whole_model_is_quantized_as_well_as_on_a_cpu(llama, text_file, tmp_path, options):
    for device in ("cpu", "cuda"):
        llmq.quantize(small_config(llama, text_file, tmp_path / device, device=device, **options))
    here, there = (errors(tmp_path / device).mean() for device in ("cuda", "cpu"))
    torch.testing.assert_close(here, there, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_model_of_16_bits_waits_four_times_a_group_wherever_its_states_are(text_file, tmp_path, monkeypatch, dtype):
    model, solve, waits = save_tiny(tmp_path / "model", dtype=dtype), Run._solve, list[int]()

    def counted(*args):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return solve(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.append(len(seen))

    monkeypatch.setattr(Run, "_solve", counted)
    for name, share in (("gpu", 1.0), ("pinned", 0.0)):
        monkeypatch.setattr(workload, "_DEVICE_SHARE", share)
        llmq.quantize(small_config(model, text_file, tmp_path / name, device="cuda"))
    assert max(waits) <= 3  # and one for the statistics
    assert equal_codes(tmp_path / "gpu", tmp_path / "pinned") >= 0.99
    report = json.loads((tmp_path / "gpu" / REPORT).read_text())
    assert 0 < report["gpu_peak_bytes"] < 1e9
    config = small_config(model, text_file, tmp_path / "cpu", device="cpu")
    llmq.quantize(config)
    torch.testing.assert_close(errors(tmp_path / "gpu").mean(), errors(tmp_path / "cpu").mean(), rtol=0.2, atol=0)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_sums_of_16_bits_are_those_of_float64(dtype):
    X = torch.randn(3000, 5000, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    H = torch.zeros(5000, 5000, device="cuda")
    for rows in X.split(1000):
        add_lower(H, rows)
    exact = X.double().T @ X.double()
    assert (mirrored(H).double() - exact).norm() / exact.norm() < 2e-6


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
