"""A tiny model quantized on a simulated GPU: what is copied, what the program waits for, and what comes out."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fake_gpu import GPU, FakeGpu
from small_runs import small_config
from tiny import save_tiny

from llmq import pipeline
from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.hidden_states import States
from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.core.distributed import ALONE
from llmq.run import block_quantizer
from llmq.run.block_quantizer import Run
from llmq.run.journal import Journal
from llmq.run.prepare import open_request

CPU = torch.device("cpu")
# Of the two micro-batches: 18 sequences of 32 tokens, and the 2 that are held out.
STATES = {(count, 32, 64) for count in (18, 2)}


def work(config, device, dtype):
    """Do what `llmq.quantize` does after its plan, on this device and in this dtype."""
    request = replace(open_request(config, CPU, ALONE, False), compute=Compute(device, dtype, dtype))
    journal = Journal(config.output / PROGRESS)
    run = Run(config, request.source, device, request.clock, ALONE, journal.add)
    with torch.no_grad():
        pipeline._work(request, run, journal, States(0, None, resident=True))


def watched(function, gpu, seen):
    """Return a function that notes for what each call waits, and which hidden states it copies."""

    def call(*args, **kwargs):
        waits, copies = len(gpu.waits), gpu.copies.copy()
        result = function(*args, **kwargs)
        states = [key for key, count in (gpu.copies - copies).items() if count and key[0] in STATES]
        seen.append((gpu.waits[waits:], states))
        return result

    return call


@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float32, "gptq"), (torch.bfloat16, "gptq"), (torch.float16, "gptq"), (torch.bfloat16, "awq+gptq")],
    ids=str,
)
def test_states_stay_and_a_group_waits_four_times(dtype, method, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Block, "autocast", lambda self: nullcontext())  # torch knows no autocast for this device
    model, seen = (
        save_tiny(tmp_path / "model", "llama-mha", dtype, num_hidden_layers=2),
        {"statistics": [], "solve": []},
    )
    configs = {name: small_config(model, text_file, tmp_path / name, method=method) for name in ("cpu", "gpu")}
    with FakeGpu() as gpu, monkeypatch.context() as patched:
        collect, solve = block_quantizer.collect_statistics, Run._solve
        patched.setattr(block_quantizer, "collect_statistics", watched(collect, gpu, seen["statistics"]))
        patched.setattr(Run, "_solve", watched(solve, gpu, seen["solve"]))
        work(configs["gpu"], GPU, dtype)
    work(configs["cpu"], CPU, dtype)
    assert len(seen["solve"]) == 8  # two blocks of four groups
    assert not any(states for _, states in (*seen["statistics"], *seen["solve"]))
    assert max(len(waits) for waits, _ in seen["solve"]) <= 3
    if method == "gptq":  # statistics are collected once for each group
        assert max(len(s) + len(t) for (s, _), (t, _) in zip(*seen.values(), strict=True)) <= 4
    here, there = (json.loads((config.output / REPORT).read_text())["groups"] for config in configs.values())
    here, there = (torch.tensor([group["error"] for group in groups]) for groups in (here, there))
    # Where two choices are equal up to rounding, all later groups follow the one that was made.
    torch.testing.assert_close(here.mean(), there.mean(), rtol=0.1, atol=0)
    if method == "gptq":
        same = 4 if dtype == torch.float32 else 1
        torch.testing.assert_close(here[:same], there[:same], rtol=0.02, atol=0)
        here, there = (Checkpoint(config.output) for config in configs.values())
        first = [n for n in here.linears if ".0." in n and (same > 1 or n.endswith(("q_proj", "k_proj", "v_proj")))]
        equal = [(here.weight(name).q == there.weight(name).q).float().mean() for name in first]
        assert sum(equal) / len(equal) > 0.99


def test_losses_for_a_budget_are_those_that_a_cpu_measures(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Block, "autocast", lambda self: nullcontext())
    model = save_tiny(tmp_path / "model", "llama-mha", torch.float32, num_hidden_layers=2)
    configs = {name: small_config(model, text_file, tmp_path / name, budget=3.8) for name in ("cpu", "gpu")}
    with FakeGpu():
        work(configs["gpu"], GPU, torch.float32)
    work(configs["cpu"], CPU, torch.float32)
    here, there = (json.loads((config.output / REPORT).read_text())["budget"] for config in configs.values())
    assert [unit["bits"] for unit in here["units"]] == [unit["bits"] for unit in there["units"]]
    losses = [torch.tensor([unit["loss"] for unit in each["units"]]) for each in (here, there)]
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)
    assert there["measured_kl"] == pytest.approx(here["measured_kl"], rel=0.1)
