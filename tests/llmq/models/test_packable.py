"""What stays in float, and why: sizes, routers, and linears that do not compute what a plain one does."""

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from llmq.core.settings import BITS
from llmq.models.block_structure import Group, find_groups
from llmq.models.packable import can_pack, split_packable


def split(block, groups, bits=4):
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    return split_packable(block, groups, dict.fromkeys(names, bits))


def observed(block, forward, hidden=None):
    """Return the linears of each group that is kept, and the reasons for the others."""
    hidden = torch.randn(1, 4, 64) if hidden is None else hidden
    with torch.no_grad():
        kept, skipped = split(block, find_groups(block, forward, hidden))
    return [group.linears for group in kept], skipped


@pytest.mark.parametrize("bits", BITS)
def test_rows_fill_whole_words_of_zero_points(bits):
    """3352 and 6448 are the rows of in_proj in Falcon-H1-0.5B and Granite-4-H-Tiny."""
    packed = {rows for rows in (3352, 6448, 264, 260, 256, 104, 96, 32, 8, 1) if can_pack(nn.Linear(32, rows), bits)}
    more = {2: {6448}, 6: {6448}, 4: {3352, 6448, 264}, 8: {3352, 6448, 264}}.get(bits, set())
    assert packed == {256, 96, 32} | more
    assert not can_pack(nn.Linear(40, 256), bits)


@pytest.mark.parametrize(
    "fused",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("in_proj_qkv", "in_proj_z"),
        ("in_proj_b", "in_proj_a"),
        ("w1", "w3"),
    ],
)
def test_an_odd_size_keeps_those_in_float_that_engines_fuse_with_it_and_no_others(fused):
    block = nn.ModuleDict({name: nn.Linear(64, 32) for name in fused} | {"g_proj": nn.Linear(64, 32)})
    block[fused[-1]] = nn.Linear(64, 40)
    kept, skipped = split(block, [Group((*fused, "g_proj"), "input_layernorm", 0.0)])
    assert kept == [Group(("g_proj",))]
    assert skipped == dict.fromkeys(fused, f"{fused[-1]} is 40x64; packed weights need multiples of 32x32")


def test_a_linear_that_runs_twice_is_a_group_of_its_own():
    block = nn.ModuleDict({"twice": nn.Linear(64, 64), "once": nn.Linear(64, 64)})
    kept, skipped = observed(block, lambda x: block["once"](x) + block["twice"](block["twice"](x)))
    assert (kept, skipped) == ([("once",), ("twice",)], {})
    groups = find_groups(block, lambda x: block["once"](x) + block["twice"](block["twice"](x)), torch.ones(1, 2, 64))
    assert split(block, groups)[0][-1] == Group(("twice",), calls=2)


def test_a_weight_that_is_read_without_a_call_stays_in_float():
    """As dt_proj of Mamba."""
    block = nn.ModuleDict({"in_proj": nn.Linear(64, 64), "dt_proj": nn.Linear(64, 64)})
    kept, skipped = observed(block, lambda x: block["in_proj"](x) @ block["dt_proj"].weight.T)
    assert kept == [("in_proj",)]
    assert "the model reads its weight without a call" in skipped["dt_proj"]


class Pair(nn.Linear):
    """Returns a tuple, as the router of Llama 4."""

    def forward(self, x):
        return super().forward(x), x


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [Pair, Scaled])
def test_a_subclass_that_computes_something_else_stays_in_float(kind):
    block = nn.ModuleDict({"up_proj": nn.Linear(64, 64), "other": kind(64, 64)})
    kept, skipped = observed(block, lambda x: block["up_proj"](x) + block["other"](x)[0])
    assert kept == [("up_proj",)]
    assert skipped == {"other": f"it is a {kind.__name__}, and did not compute what an nn.Linear does"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_subclass_that_computes_the_same_is_packed(dtype):
    block = nn.ModuleDict({"dense": FalconLinear(64, 64)}).to(dtype)
    assert observed(block, block["dense"], torch.randn(1, 4, 64).to(dtype)) == ([("dense",)], {})


class TopKRouter(nn.ModuleDict):
    """Choose experts by a network of linears, as ZAYA's."""


def test_routers_stay_in_float_but_square_gates_do_not():
    names = ("mlp.router.layer", "mlp.gate", "mlp.shared_expert_gate")
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"router": nn.ModuleDict({"layer": nn.Linear(64, 32)})})})
    block["mlp"]["gate"], block["mlp"]["shared_expert_gate"] = nn.Linear(64, 32), nn.Linear(64, 1)
    block["attention"] = nn.ModuleDict({"gate": nn.Linear(64, 64)})
    block["chooser"] = TopKRouter({"fc1": nn.Linear(64, 64)})  # whatever its size: its class says so
    kept, skipped = split(block, [Group((*names, "attention.gate", "chooser.fc1"))])
    assert kept == [Group(("attention.gate",))]
    assert skipped.pop("chooser.fc1").startswith("chooser.fc1 is a router")
    assert [skipped[name].partition(" is ")[2] for name in names] == [
        *["a router: it is small, and chooses the experts"] * 2,
        "1x64; packed weights need multiples of 32x32",
    ]


def test_experts_see_flat_tokens_or_none_and_are_no_group_by_that():
    """Empty tensors all have the same address."""
    block = nn.ModuleDict({f"expert{i}": nn.Linear(64, 64) for i in range(4)})

    def forward(x):
        flat = x.flatten(0, 1)
        parts = (flat[:3], flat[3:], flat[:0], flat[:0])
        return torch.cat([expert(part) for expert, part in zip(block.values(), parts, strict=True)]).view_as(x)

    kept, skipped = observed(block, forward)
    assert (kept, skipped) == ([("expert0",), ("expert1",), ("expert2",), ("expert3",)], {})


class GatedNorm(nn.Module):
    """Scales by a gate too, as in Mamba-2: it cannot run without one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x, gate):
        return self.weight * x * gate.sigmoid()


def test_a_norm_with_a_gate_does_not_stop_the_observation():
    block = nn.ModuleDict({"norm": GatedNorm(), "out_proj": nn.Linear(64, 64)})
    groups = find_groups(block, lambda x: block["out_proj"](block["norm"](x, x)), torch.randn(1, 4, 64))
    assert groups == [Group(("out_proj",))]


class Indexer(nn.Module):
    """Casts to the dtype of a weight, as DeepSeek-V3.2 does, and multiplies by another one itself, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.asked, self.used, self.plain = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return self.asked(x.to(self.asked.weight.dtype)) + self.plain(x) + self.used(x) @ self.used.weight


def test_a_linear_whose_weight_is_read_without_a_call_stays_in_float():
    block = Indexer()
    kept, skipped = observed(block, block)
    assert kept == [("plain",)]
    assert skipped.keys() == {"asked", "used"}
    assert all("reads its weight without a call" in reason for reason in skipped.values())
    assert {type(module) for module in block.children()} == {nn.Linear}
