import pytest
import torch
from problems import correlated_inputs, make_problem

from llmq.algorithms.match import match


def paired_problem(noise, tokens=4096, residual=False, seed=0):
    """X distorted by a linear map that W can undo, and by noise that it cannot, in a training and a held-out half."""
    generator = torch.Generator().manual_seed(seed)
    original = correlated_inputs(tokens=tokens, seed=seed)
    distortion = torch.eye(64, dtype=torch.float64) + 0.02 * torch.randn(
        64, 64, generator=generator, dtype=torch.float64
    )
    X = original @ distortion + noise * torch.randn(tokens, 64, generator=generator, dtype=torch.float64)
    dR = original @ torch.randn(64, 24, generator=generator, dtype=torch.float64) / 50
    halves = [(X[rows], original[rows], dR[rows]) for rows in (slice(0, tokens // 2), slice(tokens // 2, tokens))]
    problem = make_problem(X)
    stats, moments = problem.statistics, []
    for x, o, r in halves:
        T = (o - x) @ problem.W.T + (r if residual else 0)
        moments.append((x.T @ x / len(x), T.T @ x / len(x)))
    (stats.H, stats.lack), (stats.H_val, stats.lack_val) = moments
    return problem, halves[1]


def difference(W, problem, held_out, residual):
    X, original, dR = held_out
    wanted = original @ problem.W.T + (dR if residual else 0)
    return float((wanted - X @ W.T).square().sum())


@pytest.mark.parametrize("residual", [True, False])
def test_what_weights_can_make_up_for_is_made_up_for(residual):
    problem, held_out = paired_problem(noise=0.0, residual=residual)
    found = match(problem)
    before, after = (difference(W, problem, held_out, residual) for W in (problem.W, found.W))
    assert after < 0.02 * before
    assert found.step > 0.95


def test_held_out_tokens_shorten_the_step_where_few_tokens_were_seen():
    steps = []
    for tokens in (160, 640, 10240):
        problem, held_out = paired_problem(noise=0.5, tokens=tokens)
        found = match(problem)
        assert difference(found.W, problem, held_out, False) < difference(problem.W, problem, held_out, False)
        steps.append(found.step)
    assert steps[0] < steps[2]


def test_nothing_changes_where_nothing_differs_or_nothing_is_known():
    problem, _ = paired_problem(noise=0.1)
    problem.statistics.lack = torch.zeros_like(problem.statistics.lack)
    assert torch.equal(match(problem).W, problem.W)
    problem.statistics.lack = problem.statistics.lack_val = None
    assert torch.equal(match(problem).W, problem.W)
    assert match(problem).step == 0


def test_a_correction_that_held_out_tokens_contradict_is_not_made():
    problem, _ = paired_problem(noise=0.1)
    problem.statistics.lack_val = -problem.statistics.lack_val
    assert match(problem).step == 0
