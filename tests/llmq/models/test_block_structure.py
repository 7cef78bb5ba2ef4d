import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from torch import nn

from llmq.core.errors import RequestError
from llmq.models.block_structure import Group, Submodule, find_groups
from llmq.models.conv1d import linears_for_conv1d, stored_transposed
from llmq.models.decoder_blocks import find_blocks
from llmq.models.packable import fit_group_size, split_packable


def split(block, groups, bits=4):
    """Split the groups of a block whose linears all have so many bits."""
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    return split_packable(block, groups, dict.fromkeys(names, bits))


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION, MLP = Submodule("self_attn", 2), Submodule("mlp", None)
MHA_O = Group(("self_attn.o_proj",), "self_attn.v_proj", residual="", ends=ATTENTION)
GQA_O = Group(("self_attn.o_proj",), residual="", ends=ATTENTION)
DOWN = Group(("mlp.down_proj",), "mlp.up_proj", residual="post_attention_layernorm", ends=MLP)
# Gemma-2 and Olmo-2 normalise an output before it is added.
O_ALONE = Group(("self_attn.o_proj",), ends=ATTENTION)
DOWN_ALONE = Group(("mlp.down_proj",), "mlp.up_proj", ends=MLP)


def llama_like(o_proj, down=DOWN, mlp_norm="post_attention_layernorm", offset=0.0):
    return [Group(QKV, "input_layernorm", offset), o_proj, Group(GATE_UP, mlp_norm, offset), down]


EXPECTED = {
    "llama-mha": llama_like(MHA_O),
    "llama-gqa": llama_like(GQA_O),
    "mistral": llama_like(GQA_O),
    "qwen2": llama_like(GQA_O),
    "qwen3": llama_like(GQA_O),
    "granite": llama_like(GQA_O),
    # The norm multiplies by 1 + w, and the norm before the MLP has another name.
    # Attention of Gemma-2 returns its weights beside its output.
    "gemma2": llama_like(Group(O_ALONE.linears), DOWN_ALONE, "pre_feedforward_layernorm", 1.0),
    "gemma3": llama_like(O_ALONE, DOWN_ALONE, "pre_feedforward_layernorm", 1.0),
    # An activation lies between up and down, so no scale can pass.
    "arcee": [
        Group(QKV, "input_layernorm", 0.0),
        GQA_O,
        Group(("mlp.up_proj",), "post_attention_layernorm", 0.0),
        Group(("mlp.down_proj",), residual="post_attention_layernorm", ends=MLP),
    ],
    # One fused weight each; the rows of gate_up that feed down_proj come last.
    "phi3": [
        Group(("self_attn.qkv_proj",), "input_layernorm", 0.0),
        GQA_O,
        Group(("mlp.gate_up_proj",), "post_attention_layernorm", 0.0),
        Group(("mlp.down_proj",), "mlp.gate_up_proj", residual="post_attention_layernorm", ends=MLP),
    ],
    # Conv1D instead of linears, q, k and v in one.
    "gpt2": [
        Group(("attn.c_attn",), "ln_1", 0.0),
        Group(("attn.c_proj",), residual="", ends=Submodule("attn", 2)),
        Group(("mlp.c_fc",), "ln_2", 0.0),
        Group(("mlp.c_proj",), residual="ln_2", ends=MLP),
    ],
    # Norms come after attention and MLP: nothing produces the inputs of q, k, v alone.
    "olmo2": [Group(QKV), O_ALONE, Group(GATE_UP), DOWN_ALONE],
}


def with_linears(model):
    linears_for_conv1d(model)
    for name in stored_transposed(model):
        linear = model.get_submodule(name.removesuffix(".weight")).to_empty(device="cpu")
        linear.reset_parameters()
    return model


def groups_of(model):
    """Groups of every block, found in one forward of the real model."""
    found = []
    for block in map(model.get_submodule, find_blocks(model)):
        calls = []
        handle = block.register_forward_pre_hook(lambda _, a, k, to=calls: to.append((a, k)), with_kwargs=True)
        model(torch.arange(1, 25)[None], use_cache=False)
        handle.remove()
        (args, kwargs), state = calls[0], {n: t.clone() for n, t in block.state_dict().items()}
        found.append(find_groups(block, lambda h, b=block, a=args, k=kwargs: b(h, *a[1:], **k), args[0]))
        assert all(torch.equal(state[n], t) for n, t in block.state_dict().items()), "observing changed a weight"
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_groups_and_producers_are_observed_in_every_block(name):
    assert groups_of(with_linears(tiny_model(name))) == [EXPECTED[name]] * 2


def test_a_group_with_one_odd_sized_linear_is_left_in_float_as_a_whole():
    block = tiny_model("llama-gqa", head_dim=8).model.layers[0]  # k and v have 16 rows, q has 32
    kept, skipped = split(block, EXPECTED["llama-gqa"])
    assert [group.linears for group in kept] == [("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)]
    assert set(skipped) == set(QKV)
    assert "16x64" in skipped["self_attn.q_proj"]
    assert "multiples of 32" in skipped["self_attn.q_proj"]


@pytest.mark.parametrize(
    ("requested", "widths", "fitted"),
    [
        (128, {128, 4096}, 128),
        (128, {576, 1536}, 64),
        (128, {96, 64}, 32),
        (64, {576}, 64),
        (96, {96, 192}, 96),
        (100, {64}, 64),
        (-1, {33, 7}, -1),
        (1024, {512}, 128),
    ],
)
def test_group_size_is_the_largest_that_divides_every_layer(requested, widths, fitted):
    assert fit_group_size(requested, widths) == fitted


def test_group_size_that_divides_nothing_is_refused_with_the_widths():
    with pytest.raises(RequestError, match=r"group size 48 does not divide .*80, 112"):
        fit_group_size(48, {80, 112})


def test_a_linear_that_did_not_run_is_a_group_of_its_own():
    block = nn.ModuleDict({"used": nn.Linear(32, 32), "idle": nn.Linear(32, 32)})
    groups = find_groups(block, lambda hidden: block["used"](hidden), torch.ones(1, 2, 32))
    kept, skipped = split(block, groups)
    assert (kept[1:], skipped) == ([Group(("idle",), calls=0)], {})


class Halved(nn.Module):
    """A part that does something to what its last linear gives, in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, hidden):
        return self.b(self.a(hidden)).mul_(0.5)


class Added(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, hidden):
        return hidden + self.part(hidden)


@torch.no_grad()
def test_a_part_ends_with_a_linear_only_if_it_returns_just_its_output():
    hidden = torch.randn(1, 5, 64)
    for part, ends in (
        (Halved(), None),
        (nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), Submodule("part", None)),
    ):
        block = Added(part)
        assert find_groups(block, block, hidden)[-1].ends == ends


def test_an_odd_sized_linear_keeps_only_those_in_float_that_engines_fuse_with_it():
    """As in linear attention, where b and a have a row for each head."""
    sizes = {"in_proj_qkv": 96, "in_proj_z": 64, "in_proj_b": 4, "in_proj_a": 4}
    block = nn.ModuleDict({name: nn.Linear(64, rows, bias=False) for name, rows in sizes.items()})
    kept, skipped = split(block, [Group(tuple(sizes), "input_layernorm", 0.0)])
    assert kept == [Group(("in_proj_qkv", "in_proj_z"))]
    assert skipped.keys() == {"in_proj_b", "in_proj_a"}
