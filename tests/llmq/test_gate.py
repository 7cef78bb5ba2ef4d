from dataclasses import replace

import pytest
import torch
from problems import correlated_inputs, make_problem

from llmq.algorithms import gate, gptq
from llmq.config import Gptq

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
        plain.append(gate.held_out_loss(problem, gptq.solve(problem, Gptq())))
        gated.append(gate.held_out_loss(problem, gate.solve(problem, Gptq())))
    assert all(new <= old for new, old in zip(gated, plain, strict=True))
    assert sum(gated) < sum(plain)


def test_few_tokens_ask_for_more_damping_than_many():
    few, many = (gate.solve(split_problem(tokens), Gptq()).damping for tokens in (70, 8192))
    assert few > many


def test_steps_that_only_suit_the_calibration_tokens_are_not_kept():
    """Held-out tokens that have nothing in common with the others: what lowers the objective there is chance."""
    problem = split_problem(4096, bits=2)
    assert gate.solve(problem, Gptq()).kept == ["descent", "scale refit"]
    # Nothing can improve on codes that are exact where it counts.
    problem.statistics = replace(problem.statistics, H_val=torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    assert gate.solve(problem, Gptq()).kept == []
