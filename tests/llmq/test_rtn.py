import pytest
import torch
from problems import correlated_inputs, make_problem

from llmq.algorithms import rtn
from llmq.algorithms.problem import relative_error


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


def test_relative_error_is_the_lost_share_of_the_output_energy():
    X = correlated_inputs()
    problem = make_problem(X)
    W_hat = rtn.solve(problem).dequantize(32).double()
    lost, whole = X @ (problem.W - W_hat).T, X @ problem.W.T
    expected = float(lost.square().sum() / whole.square().sum())
    assert abs(relative_error(problem.W, W_hat, problem.statistics.H) / expected - 1) < 1e-12
    assert relative_error(problem.W, problem.W, None) == 0
    assert relative_error(torch.zeros(2, 64), torch.zeros(2, 64), None) == 0
