"""The work of one process: hidden states, and its share of the text."""

from dataclasses import replace

import pytest
import torch
from architectures.tiny_models import save_tiny
from fake_gpu import GPU
from planned import open_run

from llmq.core.distributed import ALONE, Ranks
from llmq.core.memory import free_memory
from llmq.plan import lines, plan_of, workload
from llmq.plan.workload import states_of, workload_of


class Halves(Ranks):
    """The first of two processes; it asks nobody."""

    def first(self, make):
        return make()


def load(model, text, tmp_path, ranks):
    request, run = open_run(model, text, tmp_path / "out", ranks, samples=40)
    return workload_of(request, run, states_of(request, run))


def test_hidden_states_are_counted_where_they_wait(llama, text_file, tmp_path):
    waiting, offload = tmp_path / "out", tmp_path / "offload"
    request, run = open_run(llama, text_file, waiting)
    states = states_of(request, run)
    assert states.nbytes == 2 * 10 * 64 * 64 * 4  # both streams of ten sequences of 64 tokens, in float32
    assert workload_of(request, run, states).states == states.nbytes
    request, run = open_run(llama, text_file, waiting, offload_dir=offload)
    elsewhere = states_of(request, run)
    assert elsewhere.nbytes == states.nbytes
    assert elsewhere.directory.parent == offload
    assert workload_of(request, run, elsewhere).states == 0
    plan = plan_of(request, run)
    assert f"wait on disk, in {offload}" in "\n".join(lines(plan))
    assert sum(disk.needed for disk in plan.disks) == 2 * plan.output + 2 * states.nbytes


def test_each_of_several_processes_has_its_share(llama, text_file, tmp_path):
    alone, two = (load(llama, text_file, tmp_path, ranks) for ranks in (ALONE, Halves(0, 2)))
    assert two.tokens + two.held_out < alone.tokens + alone.held_out
    assert two.states == alone.states // 2


@pytest.mark.parametrize(("name", "shared"), [("gemma4_text", 0), ("gemma4_text@shared", 2 * 2 * (16 + 32))])
def test_all_that_waits_for_the_next_block_is_counted(name, shared, text_file, tmp_path, monkeypatch):
    # With it, keys and values are bfloat16.
    monkeypatch.setattr("llmq.core.device.multiplies_bfloat16", lambda device: False)
    blocks = save_tiny(name, tmp_path / "model").config.num_hidden_layers
    request, run = open_run(tmp_path / "model", text_file, tmp_path / "out")
    states, tokens = states_of(request, run), 10 * 64
    # 32 numbers for each token and each of the blocks; keys and values of two heads of 16 and of two of 32 numbers.
    assert states.arguments == tokens * blocks * 32 * 4
    assert states.nbytes == 2 * tokens * (64 + shared) * 4 + states.arguments
    assert workload_of(request, run, states).arguments == states.arguments
    plan_of(request, run)


@pytest.mark.parametrize(("free", "where"), [(10**9, "on the meta device"), (10**5, "in memory")])
def test_states_stay_on_a_gpu_if_a_third_of_its_free_memory_holds_them(
    free, where, llama, text_file, tmp_path, monkeypatch
):
    request, run = open_run(llama, text_file, tmp_path / "out")
    host, each = free_memory(torch.device("cpu")), workload.token_bytes(request, run)
    monkeypatch.setattr(workload, "token_bytes", lambda request, run: each)
    monkeypatch.setattr(workload, "free_memory", lambda device: free if device == GPU else host)
    request = replace(request, compute=replace(request.compute, device=GPU))
    states = states_of(request, run)
    assert 10**5 < states.nbytes < 10**9 / 3
    work = workload_of(request, run, states)
    assert (work.resident, work.states) == ((states.nbytes, 0) if states.resident else (0, states.nbytes))
    request, run = open_run(llama, text_file, tmp_path / "other")
    plan = replace(plan_of(request, run), states=states, device="meta")
    assert f"wait {where}" in "\n".join(lines(plan))
