"""A block runs with its own weights, with others for a while, and with those of the original model."""

from dataclasses import replace

import pytest
import torch
from blocks import CPU, block_of, hidden_states, paired_block
from torch.nn import functional

from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.causal_attention import causal_attention
from llmq.calibration.input_statistics import collect_statistics
from llmq.core.distributed import ALONE
from llmq.core.errors import RequestError
from llmq.core.timing import Clock
from llmq.models.block_structure import find_groups


@torch.no_grad()
def test_the_original_model_keeps_its_weights_when_the_block_gets_others():
    block, original = paired_block()
    groups = find_groups(block.module, block.run, block.hidden[0])
    outputs = [block.run(h) for h in original]
    collect_statistics(block, groups[:1], Clock(), last=False)
    assert all(torch.equal(out, before) for out, before in zip(block.original, original, strict=True))
    block.replace_weight("a", torch.zeros(96, 64))
    stats = collect_statistics(block, groups[1:], Clock())[0]
    assert not stats.H.any()  # b's input in this model
    assert all(torch.equal(out, expected) for out, expected in zip(block.original, outputs, strict=True))
    assert not block.module.a.weight.any()


@torch.no_grad()
def test_a_run_of_the_original_model_uses_its_hidden_states_and_its_weights():
    block, original = paired_block()
    expected = [block.run(h) for h in original]
    block.keep_original()
    for parameter in block.module.parameters():
        parameter.data.mul_(0.5)
    block.replace_weight("a", torch.ones(96, 64))
    block.replace_weight("a", torch.zeros(96, 64))  # the second time it is not the original one that is replaced
    assert all(torch.equal(block.run_batch(i, original=True), expected[i]) for i in range(3))
    assert all(torch.equal(block.run_batch(i), block.run(block.hidden[i])) for i in range(3))
    assert not block.module.a.weight.any()
    block.forget_original()
    assert torch.equal(block.run_batch(0, original=True), block.run(original[0]))


def test_a_block_without_the_original_model_keeps_no_second_set_of_weights():
    block = block_of(hidden_states(), 2)
    block.keep_original()
    block.replace_weight("a", torch.zeros(320, 64))
    assert block._replaced == {}
    assert block.drift is None


def test_drift_is_the_share_of_energy_that_differs_on_held_out_tokens():
    block, original = paired_block()
    x, x_o = block.hidden[2].double(), original[2].double()
    assert block.drift == pytest.approx(float((x - x_o).square().sum() / x_o.square().sum()), rel=1e-5)
    assert replace(block, original=block.hidden).drift == 0


def test_other_weights_are_used_for_one_run_and_get_gradients():
    block = block_of(hidden_states(), 2)
    before, hidden = block.module.a.weight.clone(), block.hidden[0]
    W = torch.zeros(320, 64, requires_grad=True)
    output = block.run_with({"a.weight": W}, hidden)
    assert not output.any()
    (output - 1).square().sum().backward()
    assert W.grad is not None
    assert torch.equal(block.module.a.weight, before)
    assert block.run(hidden).any()


@torch.no_grad()
def test_many_runs_hold_the_weights_in_the_precision_of_matmuls_and_give_them_back():
    block = block_of(hidden_states(), 2)
    low = Block(
        "block", block.module, block.hidden, 2, ((), {}), Compute(torch.device("cpu"), precision=torch.bfloat16)
    )
    seen = []
    handle = block.module.b.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    weight = block.module.a.weight.data_ptr()
    with low.many_runs():
        assert low.module.a.weight.dtype == torch.bfloat16
        inside = low.run_batch(0)
    handle.remove()
    assert block.module.a.weight.data_ptr() == weight
    assert seen == [torch.bfloat16]
    assert torch.equal(inside, low.run_batch(0))
    assert not torch.equal(inside.float(), block.run_batch(0))


def test_a_dtype_other_than_float32_is_that_of_the_factors_too():
    assert Compute(torch.device("cpu"), torch.float16).factors == torch.float16
    assert Compute(torch.device("cpu"), torch.float32, torch.bfloat16).factors == torch.bfloat16


def test_a_block_alone_has_all_shares_and_the_first_sequence_as_its_sample():
    hidden = hidden_states(5)
    block = Block("block", torch.nn.Identity(), hidden, 3, ((), {}), CPU, ranks=ALONE)
    assert [(share.batches, share.held_out) for share in block.shares] == [
        *((range(i, i + 1), False) for i in range(3)),
        *((range(i, i + 1), True) for i in range(3, 5)),
    ]
    assert torch.equal(block.sample, hidden[0][:1])


def test_a_block_whose_code_fails_is_named_in_a_line():
    class Fails(torch.nn.Module):
        def forward(self, hidden):
            raise NotImplementedError("no kernel for this\nmachine")

    block = Block("model.layers.7", Fails(), hidden_states(), 2, ((), {}), CPU)
    with pytest.raises(
        RequestError, match=r"model.layers.7 does not run .*\(NotImplementedError: no kernel for this\)"
    ):
        block.run(block.hidden[0])


class Attention(torch.nn.Module):
    """Attention of hidden states to themselves, in 4 heads."""

    def forward(self, hidden):
        heads = hidden.unflatten(-1, (4, -1)).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_on_a_cpu_attention_runs_in_strips_if_matmuls_take_bfloat16():
    states = hidden_states()
    expected = [causal_attention(*[h.bfloat16().unflatten(-1, (4, -1)).transpose(1, 2)] * 3) for h in states]
    low = Compute(torch.device("cpu"), precision=torch.bfloat16)
    in_strips, usual = (Block("block", Attention(), states, 2, ((), {}), compute) for compute in (low, CPU))
    for i, hidden in enumerate(states):
        assert torch.equal(in_strips.run_batch(i), expected[i].transpose(1, 2).flatten(2))
        assert torch.equal(usual.run_batch(i), usual.module(hidden))
