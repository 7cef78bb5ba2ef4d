"""A plan as lines of text, and the refusal of a run that does not fit."""

import re
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from architectures.tiny_models import save_tiny as save_other_shape
from commands import error_of, run_here
from planned import SMALL, open_run
from tiny import save_tiny

from llmq.core.errors import RequestError
from llmq.core.settings import Tuned
from llmq.plan import check_plan, lines, plan_of
from llmq.plan.memory_model import END_TO_END, Moment

Usage = namedtuple("Usage", "total used free")


def test_layers_of_odd_sides_stay_in_float_and_structures_are_said_once(tmp_path, text_file, capsys):
    model = save_tiny(tmp_path / "model", intermediate_size=104, num_hidden_layers=3)
    options = {"layer_bits": ("layers.1.*=8",), "dry_run": True}
    request, run = open_run(model, text_file, tmp_path / "out", **options)
    said = "\n".join(lines(plan_of(request, run)))
    assert "mlp.gate_proj of blocks 0,2: mlp.gate_proj is 104x64; packed weights need multiples of 32x32" in said
    assert (
        "\nshare     warning: only 38.1% of the blocks' matmul weights are packed; in float: mlp.gate_proj 21%" in said
    )
    assert "each of 0,2:" in said
    assert "each of 1:" in said
    assert said.count("self_attn.o_proj 64x64, 8 bit") == said.count("self_attn.o_proj 64x64, 4 bit") == 1
    assert "time " not in said  # nothing was timed


def test_the_layers_of_a_tower_are_said_once(tmp_path, text_file):
    save_other_shape("gemma3", tmp_path / "model")
    request, run = open_run(tmp_path / "model", text_file, tmp_path / "out")
    said = "\n".join(lines(plan_of(request, run)))
    assert said.count("mlp.fc1.weight (128x64, 2 of them): only the linears of blocks are packed") == 1
    assert "lm_head.weight: it shares its weights with model.language_model.embed_tokens.weight" in said


def refused(arguments, tmp_path):
    result = run_here("llmq.quantize", "--output", tmp_path / "new" / "out", *arguments)
    assert result.returncode == 2, result.stderr
    assert list(tmp_path.iterdir()) == []
    return error_of(result)


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry"])
def test_too_small_a_disk_is_refused_before_anything_is_written(more, llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 1000, 1000))
    message = refused(("--model", llama, "--calibration", text_file, *SMALL, *more), tmp_path)
    assert "not enough disk space" in message
    assert "the checkpoint will take" in message
    assert "0 MB are free" in message
    assert "--output" in message


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry"])
def test_too_little_memory_is_refused_before_anything_is_written(more, llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.plan.plan.free_memory", lambda _: 1000)
    message = refused(("--model", llama, "--calibration", text_file, *SMALL, *more), tmp_path)
    assert re.search(r"will take \d+ MB of memory, but 0 MB are free", message)
    assert "--samples" in message


def test_hidden_states_that_are_too_many_for_memory_may_wait_on_disk(llama, text_file, tmp_path):
    request, run = open_run(llama, text_file, tmp_path / "out")
    plan = plan_of(request, run)
    few = [Moment("solving", 1000, 1000)]
    full = replace(plan, moments=few, states=replace(plan.states, nbytes=900), free=(1500, 1500))
    with pytest.raises(RequestError, match=r"use --offload-dir: it keeps 0 MB of hidden states on disk"):
        check_plan(full)
    with pytest.raises(RequestError, match="for 2 processes"):
        check_plan(replace(plan, moments=few, processes=(2, 2), free=(3000, 3000)))
    check_plan(replace(plan, moments=few, free=(2000, 2000)))
    with pytest.raises(RequestError, match="of the cuda device, but"):
        check_plan(replace(plan, moments=few, device="cuda", free=(1000, 999)))


@pytest.mark.parametrize("rate", [0.01, 0.0])
def test_a_model_that_leaves_no_room_to_train_it_is_refused_before_the_work(rate, llama, text_file, tmp_path):
    tuned = Tuned(end_steps=1, end_rate=rate, end_scale_rate=0.001)
    plan = plan_of(*open_run(llama, text_file, tmp_path / "out", method="tuned", tuned=tuned))
    (training,) = (moment for moment in plan.moments if moment.what == END_TO_END)
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)  # of the linears in all blocks
    assert training.device > 4 * plan.weight_count + weights * (20 if rate else 8)
    plan = replace(plan, program=0, moments=[training], free=(training.device, 0))
    check_plan(plan)
    with pytest.raises(RequestError, match="trains one block after the other"):
        check_plan(replace(plan, free=(training.device - 1, 0)))
