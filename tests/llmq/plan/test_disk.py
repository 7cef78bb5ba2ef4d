"""Bytes on disk: those planned are those written."""

import pytest
import torch
from planned import open_run
from safetensors.torch import load_file
from tiny import save_tiny

import llmq
from llmq import formats
from llmq.plan import plan_of


def tensor_bytes(directory):
    return sum(tensor.nbytes for path in directory.glob("*.safetensors") for tensor in load_file(path).values())


@pytest.mark.parametrize("name", ["llama-mha", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("stored_as", formats.FORMATS)
def test_the_output_is_as_large_as_planned(stored_as, name, tmp_path, text_file):
    model = save_tiny(tmp_path / "model", name, torch.bfloat16)
    options = {"format": stored_as, "method": "rtn", "symmetric": stored_as != "awq", "blocks": "1"}
    request, run = open_run(model, text_file, tmp_path / "out", **options)
    plan = plan_of(request, run)
    llmq.quantize(request.config)
    assert plan.output == pytest.approx(tensor_bytes(tmp_path / "out"), rel=0.01)


def test_what_an_earlier_run_left_need_not_be_written_again(llama, text_file, tmp_path):
    out = tmp_path / "out"
    request, run = open_run(llama, text_file, out, method="rtn")
    anew = plan_of(request, run).disks[0].needed
    parts = out / "unfinished.partial" / "work"
    parts.mkdir(parents=True)
    (parts / "part-00000.safetensors").write_bytes(bytes(20_000))
    request, run = open_run(llama, text_file, out, method="rtn", resume=True)
    assert plan_of(request, run).disks[0].needed == anew - 20_000
