"""Experts that became linears compute what transformers' experts compute, whatever the routing."""

from copy import deepcopy

import pytest
import torch
from architectures.tiny_models import tiny_model
from torch import nn

from llmq.models.experts import experts_to_linears, layouts, linears_of

E, K, ROWS, WIDTH = 4, 2, 40, 64
# How experts lie in memory and what they compute; Llama 4 and DBRX have their own kinds of modules, LongCat, too
KINDS = {
    "plain": "qwen3_moe",
    "transposed": "aria_text",
    "interleaved, with biases": "gpt_oss",
    "without a gate": "nemotron_h",
    "with a norm": "qwen3_moe",
    "all tokens": "llama4_text",
    "flat": "dbrx",
    "some return their input": "longcat_flash",
}


def theirs(kind):
    """The experts of transformers, with random numbers in all parameters."""
    model = tiny_model(KINDS[kind])
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    if kind == "with a norm":  # as Muse Spark's
        experts.has_post_expert_norm, experts.post_expert_norm = True, nn.RMSNorm(WIDTH)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.2)
    return nn.ModuleDict({"experts": experts.eval()})


def as_linears(block):
    """The same experts as linears, with the same numbers."""
    made = deepcopy(block)
    experts_to_linears(made)
    for name, layout in layouts(made).items():
        for expert in range(layout.experts):
            for inner, place in layout.places.items():
                part = place.of(block.get_submodule(name).get_parameter(place.parameter), expert, layout.experts)
                linear, _, leaf = f"{name}.{expert}.{inner}".rpartition(".")
                setattr(made.get_submodule(linear), leaf, nn.Parameter(part.detach().clone(), requires_grad=False))
    return made


def arguments(kind, index):
    X = torch.randn(ROWS, WIDTH)
    scores = torch.rand(index.shape) + 0.1
    if kind != "all tokens":
        return X[None] if kind == "flat" else X, index, scores  # DBRX's takes a batch of sequences
    to_each = torch.zeros(ROWS, E).scatter(1, index, scores)  # 0 where a token is not routed
    return ((X[None] * to_each.T[..., None]).reshape(-1, WIDTH),)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [range(E), (1, 3)], ids=["all", "two"])
def test_the_outputs_are_those_of_transformers(kind, used):
    """Also if experts get no tokens."""
    block = theirs(kind)
    torch.manual_seed(1)
    drawn = [torch.tensor(used)[torch.randperm(len(used))[:K]] for _ in range(ROWS)]
    args = arguments(kind, torch.stack(drawn))
    with torch.no_grad():
        expected, output = block["experts"](*args), as_linears(block)["experts"](*args)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all tokens"])
def test_an_expert_that_does_not_exist_adds_nothing_or_the_input(kind):
    block = as_linears(theirs(kind))
    torch.manual_seed(1)
    X, index, scores = arguments(kind, torch.randint(E, (ROWS, K)))
    none = torch.rand(ROWS, K) < 0.3
    with torch.no_grad():
        output = block["experts"](X, index.masked_fill(none, E), scores)
        expected = block["experts"](X, index, scores.masked_fill(none, 0))
    if kind == "some return their input":
        expected += X * scores.masked_fill(~none, 0).sum(1, keepdim=True)
    torch.testing.assert_close(output, expected)


def test_gate_and_up_have_their_names():
    """Swapped ones would compute the same if they were swapped twice."""
    halves, turns = theirs("plain"), theirs("interleaved, with biases")
    of_halves, of_turns = as_linears(halves)["experts"], as_linears(turns)["experts"]
    both = halves["experts"].gate_up_proj[2]
    assert torch.equal(of_halves.get_parameter("2.gate_proj.weight"), both[: len(both) // 2])
    assert torch.equal(of_halves.get_parameter("2.up_proj.weight"), both[len(both) // 2 :])
    assert torch.equal(of_turns.get_parameter("2.gate_proj.weight"), turns["experts"].gate_up_proj[2].T[0::2])
    assert torch.equal(of_turns.get_parameter("2.up_proj.bias"), turns["experts"].gate_up_proj_bias[2, 1::2])


def test_only_modules_with_one_of_the_names_are_changed():
    block = nn.ModuleDict({"a": theirs("plain"), "b": theirs("plain")})
    experts_to_linears(block, {"a.experts.0.up_proj", "b.other"})
    assert list(layouts(block)) == ["a.experts"]
    assert linears_of(layouts(block)["a.experts"]) == ["gate_proj", "up_proj", "down_proj"]
    assert not hasattr(block["a"]["experts"], "gate_up_proj")
    assert hasattr(block["b"]["experts"], "gate_up_proj")
