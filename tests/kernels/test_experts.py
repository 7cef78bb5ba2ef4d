"""Stacks of experts' weights: one tensor for all, whose parts are the experts' own."""

from dataclasses import replace

import pytest
import torch
from llmq_kernels import dequantize, stack, stack_experts
from llmq_kernels.experts import tiles_for
from weights import BITS, shuffled_groups, some_weight


def some(seed, *sizes, **kind):
    return some_weight(*(sizes or (12, 96, 3, 4)), seed=seed, **kind)[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_an_expert_is_a_view_of_the_stack_and_has_its_own_weight(bits, symmetric):
    weights = [some(seed, 12, 96, 3, bits, symmetric) for seed in range(4)]
    stacked = stack_experts(weights)
    assert (len(stacked), stacked.out_features, stacked.plane) == (4, 12, weights[0].plane)
    for e, weight in enumerate(weights):
        expert = stacked.expert(e)
        for part, whole in zip((*expert.words, expert.grid), (*stacked.words, stacked.grid), strict=True):
            assert part.data_ptr() == whole[e].data_ptr()
            assert part.is_contiguous()
        assert torch.equal(dequantize(expert, torch.float64), dequantize(weight, torch.float64))
        assert replace(expert, words=(), grid=weight.grid) == replace(weight, words=())


def test_gate_and_up_in_one_are_rows_of_an_expert_and_their_words_are_views():
    gates, ups = ([some(seed + first, 12, 96, 3, 4) for seed in range(3)] for first in (0, 10))
    stacked = stack_experts([stack(pair) for pair in zip(gates, ups, strict=True)])
    for e in range(3):
        for rows, weight in (((0, 12), gates[e]), ((12, None), ups[e])):
            part = stacked.expert(e, *rows)
            assert part.words[0].data_ptr() == stacked.words[0][e, rows[0]].data_ptr()
            assert torch.equal(part.words[0], weight.words[0])
            assert torch.equal(part.grid, weight.grid)
            assert part.grid.is_contiguous()


def test_each_expert_keeps_its_order_of_inputs_and_one_without_gets_the_plain_one():
    weights = [some(seed, group_of=shuffled_groups(96, 3, seed)) for seed in range(2)] + [some(2)]
    stacked = stack_experts(weights)
    assert not torch.equal(stacked.permutation[0], stacked.permutation[1])
    assert torch.equal(stacked.permutation[2], torch.arange(96))
    for e, weight in enumerate(weights):
        assert torch.equal(dequantize(stacked.expert(e), torch.float64), dequantize(weight, torch.float64))


@pytest.mark.parametrize(
    "other",
    [(13, 96, 3, 4), (12, 128, 4, 4), (12, 96, 6, 4), (12, 96, 3, 8), (12, 96, 3, 4, False)],
    ids=["outputs", "inputs", "groups", "bits", "symmetry"],
)
def test_experts_of_two_kinds_are_not_stacked(other):
    assert stack_experts([some(0), some(1, *other)]) is None


@pytest.mark.parametrize(
    ("pairs", "experts", "tiles"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 4), (5, 4, 4), (11, 4, 4), (12, 4, 5), (20, 4, 6), (9, 1, 2)],
)
def test_the_number_of_tiles_suffices_for_the_worst_routing(pairs, experts, tiles):
    assert tiles_for(pairs, experts, 8) == tiles

    def needed(left, experts):  # the most that any way to share the pairs needs
        if experts == 0:
            return 0 if left == 0 else -1
        return max(-(-n // 8) + rest for n in range(left + 1) if (rest := needed(left - n, experts - 1)) >= 0)

    assert needed(pairs, experts) == tiles
