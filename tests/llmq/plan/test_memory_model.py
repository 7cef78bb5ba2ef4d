"""Peak memory: the worked example of memory_model.py, and what makes it grow."""

import re
from dataclasses import replace

import pytest
import torch
from planned import open_run

from llmq.calibration.kept_inputs import most_kept
from llmq.core.distributed import ALONE
from llmq.core.settings import Tuned
from llmq.models.block_structure import Group, Submodule
from llmq.plan import memory_model, plan_of
from llmq.plan.block_shapes import Layout
from llmq.plan.memory_model import block_moments
from llmq.plan.workload import Workload

WIDTH, MLP = 4096, 11008


def block_of_llama_2_7b():
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (MLP, WIDTH) for name in ("gate", "up")} | {"mlp.down_proj": (WIDTH, MLP)}
    groups = (
        Group(tuple(f"self_attn.{name}_proj" for name in "qkv")),
        Group(("self_attn.o_proj",), residual="", ends=Submodule("self_attn", 2)),
        Group(("mlp.gate_proj", "mlp.up_proj")),
        Group(("mlp.down_proj",), residual="post_attention_layernorm", ends=Submodule("mlp", None)),
    )
    return Layout(("model.layers.0",), groups, shapes, {}, 2 * WIDTH)


# The work of the example in the docstring of memory_model.py.
EXAMPLE = Workload(
    tokens=7 * 512,
    held_out=512,
    batch=1024,
    sums=3,
    streams=2,
    linear_bytes=2,
    factor_bytes=2,
    other_bytes=4,
    sequential=True,
    statistics=True,
    states=2 * 8 * 512 * WIDTH * 4,
    rows_per_solve=4096,
    ranks=ALONE,
    most_kept=1 << 30,
)


def test_the_worked_example_is_what_the_code_computes(llama, text_file, tmp_path):
    """Both columns of the table in the docstring of memory_model.py, and its last line."""
    _, run = open_run(llama, text_file, tmp_path / "out", method="gptq")
    moments = {m.what: m.host + m.device for m in block_moments(EXAMPLE, block_of_llama_2_7b(), run)}
    table = memory_model.__doc__.split("solving down_proj")[1].split("The program")[0].splitlines()
    figures = [(cell.start(), float(cell[0])) for line in table for cell in re.finditer(r"\b\d\.\d{3}\b", line)]
    *sums, sum_of_sums = (value for column, value in figures if column < 50)
    *solving, sum_of_solving = (value for column, value in figures if column >= 50)
    assert sum(sums) == pytest.approx(sum_of_sums, abs=0.002)
    assert sum(solving) == pytest.approx(sum_of_solving, abs=0.002)
    assert max(moments, key=moments.get) == "the sums of down_proj"
    assert moments["the sums of down_proj"] / 1e9 == pytest.approx(sum_of_sums, abs=0.0006)
    assert moments["the solving of down_proj"] / 1e9 == pytest.approx(sum_of_solving, abs=0.0006)


def test_a_7b_model_needs_no_more_of_a_gpu_than_16_gb(llama, text_file, tmp_path):
    """With 128 x 2048 tokens, and the hidden states of both models on the GPU."""
    load = replace(
        EXAMPLE,
        tokens=115 * 2048,
        held_out=13 * 2048,
        batch=2048,
        other_bytes=2,
        states=0,
        rows_per_solve=1 << 40,
        resident=(resident := 2 * 128 * 2048 * WIDTH * 2),
        on_gpu=True,
        most_kept=most_kept(torch.device("cuda")),
    )
    _, run = open_run(llama, text_file, tmp_path / "out", method="gptq")
    moments = list(block_moments(load, block_of_llama_2_7b(), run))
    assert max(moment.device for moment in moments) < 16e9
    assert min(moment.device for moment in moments) > resident
    assert all(moment.host == 0 for moment in moments)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "tuned", "rtn"])
def test_memory_grows_with_what_is_kept(method, llama, text_file, tmp_path):
    tuned = Tuned(steps=3, end_steps=0)

    def most(**options):
        request, run = open_run(llama, text_file, tmp_path / "out", method=method, tuned=tuned, **options)
        return max(moment.host + moment.device for moment in plan_of(request, run).moments)

    assert most() > 0
    if method != "rtn":
        assert most(samples=40) > most()
        assert most(effort="normal", blocks="0") <= most()
