"""What a run says before it begins: layers, sizes, memory, disk, time; and what it refuses to begin."""

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import error_of, run_here
from safetensors.torch import load_file
from tiny import save_tiny

import llmq
from llmq import formats
from llmq.core.config import METHODS, QuantizeConfig
from llmq.core.distributed import ALONE, Ranks
from llmq.core.errors import RequestError, WorkError
from llmq.core.settings import Tuned
from llmq.models.safetensors_files import SafetensorsDirectory
from llmq.plan import check_plan, lines, plan_of
from llmq.plan.block_shapes import layouts
from llmq.plan.memory_model import Moment
from llmq.plan.workload import states_of, workload_of
from llmq.run.block_quantizer import Run
from llmq.run.format_roundtrip import prove
from llmq.run.prepare import open_request

CPU = torch.device("cpu")
SMALL = ("--group-size", "32", "--samples", "10", "--sequence-length", "64")
Usage = namedtuple("Usage", "total used free")


def opened(model, text, output, ranks=ALONE, **options):
    defaults = {"calibration": str(text), "samples": 10, "sequence_length": 64, "group_size": 32}
    config = QuantizeConfig(model=str(model), output=output, **(defaults | options))
    request = open_request(config, CPU, ranks, progress=False)
    return request, Run(config, request.source, CPU, request.clock, ranks)


@pytest.fixture
def unreadable(monkeypatch):
    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsDirectory, "read", read)


def tensor_bytes(directory):
    return sum(tensor.nbytes for path in directory.glob("*.safetensors") for tensor in load_file(path).values())


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_reads_no_weights_writes_nothing_and_says_what_stays_in_float(method, llama, text_file, tmp_path):
    arguments = ("--model", llama, "--output", tmp_path / "out", "--calibration", text_file, *SMALL)
    result = run_here("llmq.quantize", *arguments, "--method", method, "--blocks", "0-1", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    said = result.stdout
    assert "blocks    3, of which 2 are quantized: 0-1" in said
    assert said.count("self_attn.q_proj 64x64 + self_attn.k_proj 32x64 + self_attn.v_proj 32x64, 4 bit") == 1
    for what in ("lm_head.weight (384x64)", "model.embed_tokens.weight", "blocks 2: not among --blocks", "norms"):
        assert what in said
    for what in ("format", "bits", "output", "states", "memory", "disk", "time"):
        assert re.search(rf"^{what} ", said, re.MULTILINE), said
    assert ("looks at the weights alone" in said) == (method == "rtn")
    assert "held out" in said or method == "rtn"


def test_layers_of_odd_sides_stay_in_float_and_structures_are_said_once(tmp_path, text_file, capsys):
    model = save_tiny(tmp_path / "model", intermediate_size=104)
    options = {"layer_bits": ("layers.1.*=8",), "dry_run": True}
    request, run = opened(model, text_file, tmp_path / "out", **options)
    said = "\n".join(lines(plan_of(request, run)))
    assert "mlp.gate_proj of blocks 0,2: mlp.gate_proj is 104x64; packed weights need multiples of 32" in said
    assert "each of 0,2:" in said
    assert "each of 1:" in said
    assert said.count("self_attn.o_proj 64x64, 8 bit") == said.count("self_attn.o_proj 64x64, 4 bit") == 1
    assert "time " not in said  # nothing was timed


@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("stored_as", formats.FORMATS)
def test_the_output_is_as_large_as_planned(stored_as, name, tmp_path, text_file):
    model = save_tiny(tmp_path / "model", name, torch.bfloat16)
    options = {"format": stored_as, "method": "rtn", "symmetric": stored_as != "awq", "blocks": "1-2"}
    request, run = opened(model, text_file, tmp_path / "out", **options)
    plan = plan_of(request, run)
    llmq.quantize(request.config)
    assert plan.output == pytest.approx(tensor_bytes(tmp_path / "out"), rel=0.01)


def refused(arguments, tmp_path):
    result = run_here("llmq.quantize", "--output", tmp_path / "new" / "out", *arguments)
    assert result.returncode == 2, result.stderr
    assert list(tmp_path.iterdir()) == []
    return error_of(result)


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry"])
def test_too_small_a_disk_is_refused_before_anything_is_written(more, llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 1000, 1000))
    message = refused(("--model", llama, "--calibration", text_file, *SMALL, *more), tmp_path)
    assert "the checkpoint need" in message
    assert "0 MB are free" in message
    assert "--output" in message


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry"])
def test_too_little_memory_is_refused_before_anything_is_written(more, llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.plan.plan.free_memory", lambda _: 1000)
    message = refused(("--model", llama, "--calibration", text_file, *SMALL, *more), tmp_path)
    assert re.search(r"will take \d+ MB of memory, but 0 MB are free", message)
    assert "--samples" in message


def test_hidden_states_that_are_too_many_for_memory_may_wait_on_disk(llama, text_file, tmp_path):
    request, run = opened(llama, text_file, tmp_path / "out")
    plan = plan_of(request, run)
    few = [Moment("solving", 1000, 1000)]
    full = replace(plan, moments=few, states=replace(plan.states, nbytes=900), free=(1500, 1500))
    with pytest.raises(RequestError, match="--offload-dir keeps"):
        check_plan(full)
    with pytest.raises(RequestError, match="for 2 processes"):
        check_plan(replace(plan, moments=few, processes=(2, 2), free=(3000, 3000)))
    check_plan(replace(plan, moments=few, free=(2000, 2000)))
    check_plan(replace(plan, moments=few, free=(None, None)))
    with pytest.raises(RequestError, match="of the cuda device, but"):
        check_plan(replace(plan, moments=few, device="cuda", free=(1000, 999)))


def test_hidden_states_are_counted_where_they_wait(llama, text_file, tmp_path):
    waiting, offload = tmp_path / "out", tmp_path / "offload"
    request, run = opened(llama, text_file, waiting)
    states = states_of(request, run)
    assert states.nbytes == 2 * 10 * 64 * 64 * 4  # both streams of ten sequences of 64 tokens, in float32
    assert workload_of(request, run, states).states == states.nbytes
    request, run = opened(llama, text_file, waiting, offload_dir=offload)
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


class Halves(Ranks):
    """The first of two processes, which asks nobody."""

    def first(self, make):
        return make()


def load(model, text, tmp_path, ranks):
    request, run = opened(model, text, tmp_path / "out", ranks, samples=40)
    return workload_of(request, run, states_of(request, run))


def test_what_an_earlier_run_left_need_not_be_written_again(llama, text_file, tmp_path):
    out = tmp_path / "out"
    request, run = opened(llama, text_file, out, method="rtn")
    anew = plan_of(request, run).disks[0].needed
    parts = out / "unfinished.partial" / "work"
    parts.mkdir(parents=True)
    (parts / "part-00000.safetensors").write_bytes(bytes(20_000))
    request, run = opened(llama, text_file, out, method="rtn", resume=True)
    assert plan_of(request, run).disks[0].needed == anew - 20_000


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "phi3", "olmo2"])
def test_blocks_with_random_weights_are_made_of_what_the_real_ones_are(name, tmp_path, text_file, monkeypatch):
    found = []

    def spy(self, block, groups, *_):
        found.append(groups)
        raise WorkError("seen")

    model = save_tiny(tmp_path / "model", name)
    request, run = opened(model, text_file, tmp_path / "out")
    (layout,) = layouts(request, run)
    monkeypatch.setattr(Run, "_transform", spy)
    with pytest.raises(WorkError, match="seen"):
        llmq.quantize(request.config)
    assert list(layout.groups) == found[0]
    assert all(p.is_meta for p in request.source.skeleton.parameters())  # nothing of them stays


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "tuned", "rtn"])
def test_memory_grows_with_what_is_kept(method, llama, text_file, tmp_path):
    tuned = Tuned(steps=3, end_steps=0)

    def most(**options):
        request, run = opened(llama, text_file, tmp_path / "out", method=method, tuned=tuned, **options)
        return max(moment.host + moment.device for moment in plan_of(request, run).moments)

    assert most() > 0
    if method != "rtn":
        assert most(samples=40) > most()
        assert most(effort="normal", blocks="0") <= most()


def test_a_checkpoint_is_only_begun_if_its_format_gives_back_what_it_is_given(llama, text_file, tmp_path, monkeypatch):
    for stored_as, part in (("compressed-tensors", "weight_packed"), ("gptq", "scales"), ("awq", "qzeros")):
        module = formats.FORMATS[stored_as]
        encode = module.encode

        def lossy(name, weight, scheme, encode=encode, part=part):
            tensors = encode(name, weight, scheme)
            tensors[f"{name}.{part}"][0, 0] += 1
            return tensors

        with monkeypatch.context() as patch:
            patch.setattr(module, "encode", lossy)
            request, run = opened(llama, text_file, tmp_path / "out", format=stored_as, symmetric=stored_as != "awq")
            with pytest.raises(WorkError, match=rf"layers.0.self_attn.q_proj does not survive .* format {stored_as}"):
                llmq.quantize(request.config)
        assert list(tmp_path.iterdir()) == []
        prove(run)


def test_the_proof_sees_one_linear_of_each_shape_and_number_of_bits(llama, text_file, tmp_path, monkeypatch):
    seen = []
    module = formats.FORMATS["compressed-tensors"]
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda name, *rest: seen.append(name) or encode(name, *rest))
    _, run = opened(llama, text_file, tmp_path / "out", layer_bits=("o_proj=8",), blocks="1")
    prove(run)
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert seen == [f"model.layers.1.{leaf}" for leaf in leaves]


def test_text_that_the_model_would_write_is_not_written(llama, tmp_path, unreadable):
    request, run = opened(llama, "self", tmp_path / "out", dry_run=True)
    said = "\n".join(lines(plan_of(request, run)))
    assert "self: 576 tokens, 64 held out" in said
    assert any(moment.what == "the writing of calibration text" for moment in plan_of(request, run).moments)
    assert not Path(tmp_path / "out").exists()
