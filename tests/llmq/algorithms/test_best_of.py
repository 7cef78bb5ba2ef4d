from dataclasses import replace

import pytest
import torch
from problems import correlated_inputs, make_problem, threads

from llmq.algorithms import best_of, gptq
from llmq.algorithms.coordinate_descent import descend
from llmq.algorithms.problem import damped
from llmq.core.settings import Gptq

WIDTH = 64


def split_problem(tokens, bits=3, seed=0):
    """A problem whose held-out statistics come from other tokens of the same kind."""
    X = correlated_inputs(tokens=tokens + 4096, width=WIDTH, seed=seed)
    problem = make_problem(X[:tokens], bits=bits)
    held_out = X[tokens:]
    problem.statistics = replace(problem.statistics, H_val=held_out.T @ held_out / len(held_out))
    return problem


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [70, 2048])
def test_never_worse_than_gptq_on_held_out_tokens_and_better_on_the_whole(bits, tokens):
    plain, gated = [], []
    for seed in range(4):
        problem = split_problem(tokens, bits, seed)
        plain.append(best_of.held_out_loss(problem, gptq.solve(problem, Gptq())))
        gated.append(best_of.held_out_loss(problem, best_of.solve(problem, Gptq())))
    assert all(new <= old for new, old in zip(gated, plain, strict=True))
    assert sum(gated) < sum(plain)


def test_what_is_kept_does_not_depend_on_the_number_of_threads():
    X = correlated_inputs(tokens=600, width=192, dtype=torch.float32)
    problem, found = make_problem(X, rows=320, bits=3), []
    for count in (1, 2):
        with threads(count):
            found.append(best_of.solve(problem, Gptq()))
    assert (found[1].damping, found[1].kept) == (found[0].damping, found[0].kept)
    assert torch.equal(found[1].q, found[0].q)
    assert torch.equal(found[1].scale, found[0].scale)


def test_few_tokens_ask_for_more_damping_than_many():
    few, many = (best_of.solve(split_problem(tokens), Gptq()).damping for tokens in (70, 8192))
    assert few > many


def test_a_trial_that_helps_only_on_the_calibration_tokens_is_not_kept(monkeypatch):
    problem = split_problem(20, bits=2)  # far fewer tokens than columns
    before = gptq.solve(problem, Gptq())
    H = damped(problem.statistics.H, 1e-6)
    after = descend(problem, before, H, passes=20)

    def on_calibration(solution):
        E = problem.W - solution.dequantize(problem.grid.group_size)
        return float((E * (E @ H)).sum())

    assert on_calibration(after) < on_calibration(before)
    assert best_of.held_out_loss(problem, after) > best_of.held_out_loss(problem, before)
    monkeypatch.setattr(best_of, "_DAMPINGS", (1.0,))
    overfitting = {"overfitting": lambda problem, solution, _: descend(problem, solution, H, 20)}
    monkeypatch.setattr(best_of, "_TRIALS", overfitting)
    kept = best_of.solve(problem, Gptq())
    assert kept.kept == []
    assert torch.equal(kept.q, before.q)


def test_trials_that_help_on_both_are_kept():
    assert best_of.solve(split_problem(4096, bits=2), Gptq()).kept == ["descent", "scale refit"]
