"""merge=True: the same numbers from fewer matmuls."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import logits, pack, random_weight, some_tokens
from tiny import save_tiny
from torch import nn

import llmq
from llmq.core.settings import BITS
from llmq.runtime.fused_siblings import MergedLinear, MergedSibling, merge_linears
from llmq.runtime.packed_linear import PackedLinear


class Block(nn.Module):
    """Three linears on one input, as attention calls them."""

    def __init__(self, *weights, biases=(None, None, None)):
        super().__init__()
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            setattr(self, name, PackedLinear.from_codes(weight, bias))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def alike(**options):
    return [random_weight(rows, 96, 3, seed=rows, **options) for rows in (48, 16, 33)]


def count_calls(block):
    """A list that grows by one for every matmul."""
    calls = []
    for module in block.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_parts_give_what_the_linears_gave_from_one_matmul(bits, symmetric):
    block = Block(*alike(bits=bits, symmetric=symmetric), biases=[torch.randn(n) for n in (48, 16, 33)])
    x = torch.randn(65, 96)
    expected = block(x)
    dense = [linear.dequantize() for linear in block.children()]
    assert merge_linears(block) == 1
    calls = count_calls(block)
    for y, whole in zip(block(x), expected, strict=True):
        torch.testing.assert_close(y, whole, rtol=1e-6, atol=1e-6)  # one matmul may sum in another order
    assert len(calls) == 1
    assert all(torch.equal(part.dequantize(), W) for part, W in zip(block.children(), dense, strict=True))


def test_another_input_is_computed_anew_and_nothing_is_kept_afterwards():
    block = Block(*alike())
    separate = copy.deepcopy(block)
    merge_linears(block)
    calls = count_calls(block)
    x, z = torch.randn(65, 96), torch.randn(65, 96)
    torch.testing.assert_close(block.q_proj(x), separate.q_proj(x))
    torch.testing.assert_close(block.k_proj(z), separate.k_proj(z))
    torch.testing.assert_close(block.q_proj(z), separate.q_proj(z))
    torch.testing.assert_close(block.q_proj(z), separate.q_proj(z))  # asked twice: computed twice
    assert len(calls) == 3
    block(x)
    owner = next(module for module in block.modules() if isinstance(module, MergedLinear))
    assert owner._held == (None, [])


@pytest.mark.parametrize(
    "odd",
    [{"bits": 8}, {"groups": 1}, {"columns": 192, "groups": 6}, {"symmetric": False}],
    ids=str,
)
def test_linears_of_different_kinds_stay_apart(odd):
    shape = {"rows": 16, "columns": 96, "groups": 3} | odd
    block = Block(*alike()[:2], random_weight(**shape))
    assert merge_linears(block) == 0
    assert all(isinstance(linear, PackedLinear) for linear in block.children())


def test_a_bias_on_some_only_keeps_them_apart():
    assert merge_linears(Block(*alike(), biases=(torch.ones(48), None, None))) == 0


@pytest.mark.parametrize("options", [{}, {"format": "mlx", "symmetric": False}], ids=["codes", "real zero points"])
@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen2", "gemma3"])
def test_a_loaded_model_computes_the_same(tmp_path, architecture, options):
    directory = pack(save_tiny(tmp_path / "source", architecture), tmp_path / "packed", bits=8, **options)
    apart, merged = llmq.load(directory, "cpu"), llmq.load(directory, "cpu", merge=True)
    assert sum(isinstance(module, MergedLinear) for module in merged.modules()) == 2 * 2
    assert sum(isinstance(module, MergedSibling) for module in merged.modules()) == 5 * 2
    ids = some_tokens()
    torch.testing.assert_close(logits(merged, ids), logits(apart, ids), rtol=1e-5, atol=1e-5)
    how = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    written = apart.generate(ids[:1, :5], **how)
    assert torch.equal(merged.generate(ids[:1, :5], **how), written)
    assert torch.equal(llmq.fast_generate(merged, ids[:1, :5], **how).sequences, written)
    sizes = [sum(tensor.nbytes for tensor in model.state_dict().values()) for model in (merged, apart)]
    assert sizes[0] == sizes[1]


TRACED = """
import copy, torch
from packed import with_real_zeros
from test_fused_siblings import Block, alike
from llmq.runtime.fused_siblings import merge_linears

for weights in (alike(bits=3), map(with_real_zeros, alike(bits=3))):
    block = Block(*weights)
    separate = copy.deepcopy(block)
    assert merge_linears(block) == 1
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, 96)
        for y, expected in zip(compiled(x), separate(x), strict=True):
            torch.testing.assert_close(y, expected)
print("traced")
"""


def test_merged_linears_trace_into_one_graph():
    # In a process of its own: the tests' shape checks wrap every function, and dynamo cannot see through them.
    root = Path(__file__).parents[3]
    paths = [str(root / name) for name in (".", "kernels", "tests", "tests/llmq/runtime")]
    done = subprocess.run(
        [sys.executable, "-c", TRACED], env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True
    )
    assert done.stdout.decode().split() == ["traced"], done.stderr.decode()
