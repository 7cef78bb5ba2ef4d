"""What an expert borrows from the layer lowers the loss on other tokens."""

from dataclasses import replace

import pytest
import torch
from problems import make_problem

from llmq.algorithms import gptq
from llmq.algorithms.shrinkage import (
    STRENGTHS,
    USUAL,
    Judge,
    chosen_strength,
    expected_loss,
    judges_among,
    mixed,
    share_of_layer,
    shrunk,
)
from llmq.algorithms.stable_sums import lost_energy
from llmq.calibration.input_statistics import InputStatistics
from llmq.calibration.layer_moments import LayerMoments
from llmq.core.settings import Gptq

WIDTH = 64


def moments(tokens, unlike, seed):
    """Return second moments of an expert from so many tokens, held-out ones, and those of a layer of such experts."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(WIDTH, WIDTH, generator=generator) / 8 + torch.diag(torch.linspace(0.3, 2, WIDTH))

    def inputs(count, own):
        return torch.randn(count, WIDTH, generator=generator) @ (common + unlike * own)

    own = torch.randn(WIDTH, WIDTH, generator=generator) / 8
    others = torch.cat([inputs(500, torch.randn(WIDTH, WIDTH, generator=generator) / 8) for _ in range(8)])
    H, V, layer = (X.T @ X / len(X) for X in (inputs(tokens, own), inputs(4000, own), others))
    return H, V, layer


def real_loss(H, V):
    problem = make_problem(torch.ones(1, WIDTH), rows=256)
    problem.statistics = replace(problem.statistics, H=H)
    return float(lost_energy(problem, gptq.solve(problem, Gptq(order="static")), V))


@pytest.mark.parametrize("unlike", [0.3, 1.5])
def test_the_expected_loss_orders_shares_as_the_real_one_does(unlike):
    H, V, layer = moments(tokens=60, unlike=unlike, seed=1)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    expected, real = [], []
    for share in shares:
        M = mixed(H, layer, share)
        expected.append(expected_loss(M, V, 0.05))
        real.append(real_loss(M, V))
    relative = [[loss / losses[2] for loss in losses] for losses in (expected, real)]
    torch.testing.assert_close(torch.tensor(relative[0]), torch.tensor(relative[1]), rtol=0.1, atol=0)
    assert real.index(min(real)) == expected.index(min(expected))


def test_more_is_borrowed_where_experts_are_alike():
    strengths = []
    for unlike in (0.1, 4.0):
        H, V, layer = moments(100, unlike, seed=1)
        strengths.append(chosen_strength([Judge(100, 50, H, V)], LayerMoments(layer, layer), 0.05))
    assert strengths == [STRENGTHS[-1], STRENGTHS[0]]


def test_without_held_out_tokens_the_usual_strength_is_taken():
    H = torch.eye(4)
    assert judges_among([5, 9], [0, 0]) == []
    assert chosen_strength([], LayerMoments(H, H), 0.05) == USUAL


def test_judges_are_spread_by_tokens_and_have_held_out_ones():
    assert judges_among([10, 50, 20, 40, 30, 60], [1, 1, 1, 1, 1, 0]) == [0, 4, 1]
    assert judges_among([7, 0], [2, 0]) == [0]


def test_an_expert_that_saw_nothing_gets_the_layers_moments_and_no_target():
    zero, layer = torch.zeros(4, 4), LayerMoments(torch.eye(4), 2 * torch.eye(4))
    own = InputStatistics(zero, zero, 0, 0, torch.zeros(8, 4), torch.zeros(8, 4))
    result = shrunk(own, layer, held_out=0, strength=2.0)
    assert torch.equal(result.H, layer.H)
    assert torch.equal(result.H_val, layer.H_val)
    assert result.borrowed == 1.0
    assert not result.target_moment.any()


def test_many_tokens_borrow_little():
    own = InputStatistics(torch.eye(4), torch.eye(4), 10**6, 0, torch.ones(8, 4), torch.ones(8, 4))
    result = shrunk(own, LayerMoments(9 * torch.eye(4), 9 * torch.eye(4)), held_out=10**5, strength=2.0)
    torch.testing.assert_close(result.H, torch.eye(4), rtol=1e-3, atol=0)
    torch.testing.assert_close(result.target_moment, torch.ones(8, 4), rtol=1e-3, atol=0)
    assert 0 < result.borrowed < 1e-4
    assert share_of_layer(8, 4, 2.0) == 0.5
