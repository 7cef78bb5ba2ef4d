import pytest
import torch
from problems import correlated_inputs, make_problem, threads

from llmq.algorithms.output_matching import Match, choose, matched
from llmq.algorithms.problem import ROW_MULTIPLE, spread


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
    (stats.H, stats.target_moment), (stats.H_val, stats.target_moment_val) = moments
    return problem, halves[1]


def difference(W, problem, held_out, residual):
    X, original, dR = held_out
    wanted = original @ problem.W.T + (dR if residual else 0)
    return float((wanted - X @ W.T).square().sum())


def large_problem(width, rows):
    """In float32, with made-up target moments, as far as another half of the tokens agrees."""
    X = correlated_inputs(tokens=2 * width, width=width, dtype=torch.float32)
    problem, generator = make_problem(X, rows=rows), torch.Generator().manual_seed(0)
    wanted = 0.1 * torch.randn(rows, width, generator=generator)
    noise = torch.randn(2, rows, width, generator=generator)
    stats = problem.statistics
    stats.target_moment, stats.target_moment_val = (wanted @ stats.H + 0.02 * part for part in noise)
    return problem


@pytest.mark.parametrize("residual", [True, False])
def test_what_weights_can_make_up_for_is_made_up_for(residual):
    problem, held_out = paired_problem(noise=0.0, residual=residual)
    choice = choose(problem)
    before, after = (difference(W, problem, held_out, residual) for W in (problem.W, matched(problem, choice)))
    assert after < 0.02 * before
    assert choice.alpha > 0.95


def test_held_out_tokens_make_alpha_smaller_where_few_tokens_were_seen():
    alphas = []
    for tokens in (160, 640, 10240):
        problem, held_out = paired_problem(noise=0.5, tokens=tokens)
        choice = choose(problem)
        W = matched(problem, choice)
        assert difference(W, problem, held_out, False) < difference(problem.W, problem, held_out, False)
        alphas.append(choice.alpha)
    assert alphas[0] < alphas[2]


def test_the_weights_move_as_the_formula_says(monkeypatch):
    monkeypatch.setattr("llmq.algorithms.output_matching._ROWS", 7)
    problem, _ = paired_problem(noise=0.1)
    H, target_moment = problem.statistics.H, problem.statistics.target_moment
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(64, dtype=H.dtype)
    expected = problem.W + 0.75 * target_moment @ torch.linalg.inv(damped)
    assert torch.allclose(matched(problem, Match(0.05, 0.75)), expected, rtol=1e-10, atol=1e-12)


def test_nothing_changes_where_nothing_differs_or_nothing_is_known():
    problem, _ = paired_problem(noise=0.1)
    problem.statistics.target_moment = torch.zeros_like(problem.statistics.target_moment)
    assert torch.equal(matched(problem, choose(problem)), problem.W)
    problem.statistics.target_moment = problem.statistics.target_moment_val = None
    assert torch.equal(matched(problem, choose(problem)), problem.W)
    assert choose(problem).alpha == 0


def test_a_correction_that_held_out_tokens_contradict_is_not_made():
    problem, _ = paired_problem(noise=0.1)
    problem.statistics.target_moment_val = -problem.statistics.target_moment_val
    assert choose(problem).alpha == 0


def test_nothing_changes_with_the_number_of_threads():
    problem, found = large_problem(width=1536, rows=96), []
    for count in (1, 2, 3):
        with threads(count):
            choice = choose(problem)
            found.append((choice, matched(problem, choice)))
    assert found[0][0].alpha > 0.2
    for choice, W in found[1:]:
        assert choice == found[0][0]
        assert torch.equal(W, found[0][1])


def test_rows_moved_apart_move_as_they_do_together():
    problem = large_problem(width=576, rows=272)
    choice = choose(problem)
    parts = [problem.rows(start, stop) for start, stop in ((0, 16), (16, 112), (112, 272))]
    with threads(2):
        together = matched(problem, choice)
        assert torch.equal(torch.cat([matched(part, choice) for part in parts]), together)
    assert not torch.equal(together, problem.W)


def test_the_rows_that_choose_are_spread_and_of_a_number_that_any_threads_add_up_alike():
    for rows in (1, 15, 16, 31, 32, 96, 272, 288, 576, 1120, 3072, 22016):
        chosen = range(rows)[spread(rows)]
        assert len(chosen) == rows if rows < 16 else len(chosen) % ROW_MULTIPLE == 0
        assert len(chosen) > min(rows, 256) - 16
        assert chosen[-1] >= rows - 16 * chosen.step
