"""The share of packed weights counts what matmuls read, and names what stays in float."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.models.packed_share import PackedShare, matmul_weights, packed_share


class Experts(nn.Module):
    """As in gpt-oss: stacks of matrices, and biases of two dimensions."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 128))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 128))
        self.w1 = nn.Parameter(torch.zeros(256, 64))  # DBRX keeps them in two dimensions


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log, self.stack = nn.Parameter(torch.zeros(8, 16)), nn.Parameter(torch.zeros(2, 8, 16))
        self.mix = nn.Parameter(torch.zeros(1, 1, 64))  # one number for each channel
        self.conv1d, self.norm = nn.Conv1d(64, 64, 4), nn.LayerNorm(64)


class TopKRouter(nn.Linear):
    """As that of PhiMoE."""


def block():
    parts = {"experts": Experts(), "mixer": Mixer(), "embed": nn.Embedding(9, 64)}
    parts |= {"gate": nn.Linear(64, 4), "chooser": TopKRouter(64, 64), "shared_expert_gate": nn.Linear(64, 1)}
    return nn.ModuleDict(parts | {"o_proj": nn.Linear(64, 64), "c_proj": nn.Linear(64, 32)})


def test_only_weights_of_matmuls_are_counted():
    assert matmul_weights(block()) == {
        "experts.gate_up_proj": 4 * 64 * 128,
        "experts.w1": 256 * 64,
        "mixer.stack": 2 * 8 * 16,
        "o_proj.weight": 64 * 64,
        "c_proj.weight": 32 * 64,
    }


def test_kinds_are_summed_over_blocks_and_experts_are_named():
    share = packed_share(nn.ModuleList([block(), block()]), "01", {"0.o_proj", "1.o_proj"})
    total = sum(matmul_weights(block()).values())
    assert share.share == pytest.approx(64 * 64 / total)
    assert list(share.in_float) == ["experts.gate_up_proj", "experts.w1", "c_proj", "mixer.stack"]
    assert share.in_float["experts.w1"] == pytest.approx(256 * 64 / total)
    assert str(share) == (
        "warning: only 7.4% of the blocks' matmul weights are packed; in float: experts.gate_up_proj 59%, "
        "experts.w1 29%, c_proj 4%; the experts stay in float: llmq does not quantize them yet"
    )


def test_experts_that_are_linears_are_one_kind_and_no_reason_for_a_promise():
    experts = nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(64, 64)}) for _ in range(3))})
    share = packed_share(nn.ModuleList([experts]), "0", {"0.experts.1.w1"})
    assert (share.share, share.in_float) == (pytest.approx(1 / 3), {"experts.w1": pytest.approx(2 / 3)})
    assert str(share).endswith("in float: experts.w1 67%")


@pytest.mark.parametrize(("share", "warns"), [(0.9, False), (0.899, True)])
def test_a_share_below_nine_tenths_is_a_warning(share, warns):
    assert str(PackedShare(share, {"o_proj": 1 - share})).startswith("warning") is warns


def test_parallel_experts_without_the_word_in_their_name_are_known_by_their_class():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": 4}
    config = AutoConfig.for_model("jetmoe", **sizes, num_key_value_heads=2, kv_channels=16, vocab_size=99)
    assert packed_share(AutoModelForCausalLM.from_config(config), ["model.layers.0"], set()).has_experts
