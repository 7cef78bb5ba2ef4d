"""Plans of mixtures of experts: their experts are one stage, and share nothing but their inputs."""

from dataclasses import replace

import pytest
from architectures.tiny_models import save_tiny
from planned import open_run

from llmq.core.distributed import ALONE
from llmq.models.block_structure import Expert, Group
from llmq.plan import lines, plan_of
from llmq.plan.block_shapes import Layout, layouts, random_blocks
from llmq.plan.memory_model import block_moments
from llmq.plan.microbenchmarks import Speeds
from llmq.plan.time_model import block_seconds
from llmq.plan.workload import Workload, states_of, workload_of

SPEEDS = Speeds(product=1e-10, moment=1e-10, addition=1e-10, solve=(1e-6, 1e-10, 1e-8, 1e-9), weight=0.0, byte=0.0)


def open_tiny(name, text, tmp_path, **options):
    save_tiny(name, tmp_path / "model")
    return open_run(tmp_path / "model", text, tmp_path / "out", **options)


def block_of_experts(hidden, inner, experts, top, attention):
    """Return a block of experts, with one linear of hidden x attention that stands for all of its attention."""
    module, shapes = "mlp.experts", {"self_attn.o_proj": (hidden, attention)}
    groups = [Group(("self_attn.o_proj",))]
    for number in range(experts):
        gate, up, down = (f"{module}.{number}.{name}_proj" for name in ("gate", "up", "down"))
        shapes |= {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
        groups += [Group(linears, expert=Expert(module, number)) for linears in ((gate, up), (down,))]
    return Layout(("model.layers.0",), tuple(groups), shapes, {}, 2 * hidden, {module: top / experts})


def load_of(tokens, width, **others):
    """Return the work of one process that multiplies in float32, with a tenth of its tokens held out."""
    streams = 2 * tokens * width * 4
    load = Workload(
        tokens=tokens * 9 // 10,
        held_out=tokens // 10,
        batch=2048,
        sums=3,
        streams=2,
        linear_bytes=4,
        factor_bytes=4,
        other_bytes=4,
        sequential=True,
        statistics=True,
        states=streams,
        rows_per_solve=4096,
        ranks=ALONE,
        experts=streams * 3 // 2,
    )
    return replace(load, **others)


def most(load, layout, run):
    return max(moment.host + moment.device for moment in block_moments(load, layout, run))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_kinds_of_linears_are_said_once(name, text_file, tmp_path):
    said = "\n".join(lines(plan_of(*open_tiny(name, text_file, tmp_path))))
    assert "mlp.experts.*.gate_proj " in said
    assert said.count("mlp.experts.") == 3 * said.count("mlp.experts.*.down_proj ") == 3
    assert said.count(" bit, 4 of them") == 2
    assert " of inputs of experts wait in memory" in said


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text"])
def test_an_expert_gets_its_share_of_the_tokens(name, text_file, tmp_path):
    request, run = open_tiny(name, text_file, tmp_path)
    config = request.source.config
    (layout,) = (each for each in layouts(request, run) if each.shares)
    (share,) = layout.shares.values()
    assert share == pytest.approx(config.num_experts_per_tok / 4)
    experts = [group for group in layout.groups if group.expert is not None]
    assert layout.used(experts) == pytest.approx(share * sum(map(layout.weights_of, experts)))
    assert layout.used_count == pytest.approx(layout.weight_count - (1 - share) * sum(map(layout.weights_of, experts)))


def test_experts_of_random_blocks_are_in_memory_once(text_file, tmp_path):
    request, run = open_tiny("qwen3_moe", text_file, tmp_path)
    _, block = next(random_blocks(request, run, request.tokens.train[:1]))
    experts = block.module.get_submodule("mlp.experts")
    gates = {experts.get_submodule(f"{number}.gate_proj").weight.data_ptr() for number in range(4)}
    assert len(gates) == 1
    assert block.run(block.hidden[0]).isfinite().all()


def test_what_enters_the_experts_waits_where_the_hidden_states_do(text_file, tmp_path):
    request, run = open_tiny("qwen3_moe", text_file, tmp_path)
    states = states_of(request, run)
    # Both streams of ten sequences of 64 tokens, and what the block's output lacks, in float32.
    assert states.experts == 3 * 10 * 64 * 64 * 4
    assert workload_of(request, run, states).experts == states.experts
    request = replace(request, config=replace(request.config, offload_dir=tmp_path / "states"))
    plan = plan_of(request, run)
    assert workload_of(request, run, plan.states).experts == 0
    assert sum(disk.needed for disk in plan.disks) == 2 * plan.output + 2 * plan.states.nbytes + plan.states.experts
    request, run = open_run(tmp_path / "model", text_file, tmp_path / "out", method="rtn")
    assert states_of(request, run).experts == 0


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq+gptq"])
def test_a_block_needs_its_weights_and_the_statistics_of_one_expert(method, llama, text_file, tmp_path):
    """Twice the experts of half the share: twice their weights, and hardly more of all else."""
    _, run = open_run(llama, text_file, tmp_path / "out", method=method)
    few, many = (block_of_experts(1024, 512, number, 4, 1024) for number in (32, 64))
    load = load_of(8192, 1024, statistics=method != "rtn")
    kept = 2 if method == "awq+gptq" else 1  # a transform keeps the original's weights
    more = (many.weight_count - few.weight_count) * 4
    assert most(load, many, run) - most(load, few, run) == pytest.approx(kept * more, rel=0.1)


def test_a_block_of_deepseek_v3_fits_into_64_gb_with_128_x_2048_tokens(llama, text_file, tmp_path):
    _, run = open_run(llama, text_file, tmp_path / "out")
    layout = block_of_experts(7168, 2048, 256, 8, 26000)  # attention and the shared expert have 232 million weights
    load = load_of(128 * 2048, 7168)
    assert most(load, layout, run) > 64e9
    assert 46e9 < most(replace(load, states=0, experts=0), layout, run) < 62e9
    by_name = {moment.what: moment for moment in block_moments(load, layout, run)}
    # Two streams of hidden states, three of what enters the experts; the row and the weight of eight choices.
    choices = 8 * (load.tokens + load.held_out)
    assert by_name["the sums of all experts"].host == 128 * 2048 * 5 * 7168 * 4 + 12 * choices


def test_the_time_of_an_expert_is_that_of_its_own_tokens(llama, text_file, tmp_path):
    _, run = open_run(llama, text_file, tmp_path / "out")
    load = load_of(8192, 1024)
    few, many = (block_of_experts(1024, 512, number, 4, 1024) for number in (32, 64))
    assert few.used_count == pytest.approx(many.used_count)
    one, two = (block_seconds(load, layout, 1e-3, run, SPEEDS) for layout in (few, many))
    assert two["forward"] == pytest.approx(one["forward"])
    assert two["solve"] > 1.9 * one["solve"]
    assert one["statistics"] < two["statistics"] < 1.5 * one["statistics"]
    every = replace(many, shares={"mlp.experts": 1.0})
    token = 1e-3 * every.used_count / many.used_count  # the same time for each multiplication
    assert block_seconds(load, every, token, run, SPEEDS)["statistics"] > 5 * two["statistics"]
