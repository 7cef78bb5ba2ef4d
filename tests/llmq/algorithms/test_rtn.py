from pathlib import Path

import pytest
import torch
from problems import correlated_inputs, make_problem

from llmq.algorithms import ALGORITHMS, rtn, stable_sums
from llmq.algorithms.problem import joined
from llmq.core.config import METHODS, QuantizeConfig
from llmq.core.distributed import ALONE
from llmq.run.layer_problem import errors_of


def test_every_weight_goes_to_the_nearest_point_of_its_group():
    problem = make_problem(correlated_inputs(), bits=3, group_size=16)
    solution = rtn.solve(problem)
    points = torch.arange(8)[:, None, None] - solution.zero.double()
    values = (solution.scale.double() * points).repeat_interleave(16, dim=2)
    nearest = (values - problem.W).abs().amin(0)
    assert torch.allclose((problem.W - solution.dequantize(16)).abs(), nearest, atol=1e-6)


def test_needs_no_statistics_unless_the_grid_does():
    plain, weighted = (make_problem(correlated_inputs(), search=search) for search in ("mse", "hessian"))
    with_statistics = rtn.solve(plain).q
    plain.statistics = None
    assert torch.equal(rtn.solve(plain).q, with_statistics)
    assert not torch.equal(rtn.solve(weighted).q, with_statistics)


def config_of(method):
    return QuantizeConfig(model="m", output=Path("out"), method=method)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_search_is_best_in_what_it_looks_for(bits, symmetric):
    X, errors = correlated_inputs(outliers=4), {}
    for search in ("minmax", "mse", "hessian"):
        problem = make_problem(X, rows=64, bits=bits, symmetric=symmetric, search=search)
        E = (problem.W - rtn.solve(problem).dequantize(32)).abs()
        errors[search] = float(E.pow(2.4).sum()), float(E.square().sum(0) @ problem.statistics.H.diagonal())
    assert errors["mse"][0] < min(errors["minmax"][0], errors["hessian"][0])
    assert errors["hessian"][1] < min(errors["minmax"][1], errors["mse"][1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "common", "mse", "hessian"])
def test_strips_and_slices_of_rows_change_nothing(search, symmetric, monkeypatch):
    X = correlated_inputs(dtype=torch.float32)
    problem = make_problem(X, rows=101, bits=3, symmetric=symmetric, search=search)
    whole, W_hat = rtn.solve(problem), rtn.solve(problem).dequantize(32)
    apart = joined([rtn.solve(problem.rows(start, stop)) for start, stop in ((0, 1), (1, 37), (37, 101))])
    monkeypatch.setitem(stable_sums._WEIGHTS, "cpu", 64 * 7)
    stripped = rtn.solve(problem)
    for other in (apart, stripped):
        assert torch.equal(other.q, whole.q)
        assert torch.equal(other.scale, whole.scale)
        assert torch.equal(other.zero, whole.zero)
    assert torch.equal(stripped.dequantize(32), W_hat)


def test_rows_of_a_problem_are_views_of_what_belongs_to_them():
    problem = make_problem(correlated_inputs(), rows=6)
    assert problem.rows(2, 5).statistics == problem.statistics
    problem.statistics.target_moment = problem.W + 1
    problem.clippable[3] = False
    part = problem.rows(2, 5)
    assert part.W.data_ptr() == problem.W[2].data_ptr()
    assert torch.equal(part.statistics.target_moment, problem.W[2:5] + 1)
    assert part.statistics.target_moment_val is None
    assert part.statistics.H is problem.statistics.H
    assert part.clippable.tolist() == [True, False, True]
    problem.statistics = None
    assert problem.rows(0, 1).statistics is None


@pytest.mark.parametrize("method", [name for name in METHODS if ALGORITHMS[name].rows_apart(config_of(name))])
def test_a_process_that_gets_no_rows_has_none_to_give(method):
    problem = make_problem(correlated_inputs(dtype=torch.float32))
    solution = ALGORITHMS[method].solve(problem.rows(24, 24), config_of(method))
    whole = ALGORITHMS[method].solve(problem, config_of(method))
    for part in ("q", "scale", "zero"):
        none, all_rows = getattr(solution, part), getattr(whole, part)
        assert none.shape == (0, *all_rows.shape[1:])
        assert none.dtype == all_rows.dtype
    assert errors_of(problem.rows(24, 24), solution, False, ALONE) == (0, 0)
