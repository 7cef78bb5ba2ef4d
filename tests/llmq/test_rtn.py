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


def test_needs_no_statistics():
    problem = make_problem(correlated_inputs())
    with_statistics = rtn.solve(problem).q
    problem.statistics = None
    assert torch.equal(rtn.solve(problem).q, with_statistics)


def test_relative_error_is_the_lost_share_of_the_output_energy():
    X = correlated_inputs()
    problem = make_problem(X)
    W_hat = rtn.solve(problem).dequantize(32).double()
    lost, whole = X @ (problem.W - W_hat).T, X @ problem.W.T
    expected = float(lost.square().sum() / whole.square().sum())
    assert abs(relative_error(problem.W, W_hat, problem.statistics.H) / expected - 1) < 1e-12
    assert relative_error(problem.W, problem.W, None) == 0
    assert relative_error(torch.zeros(2, 64), torch.zeros(2, 64), None) == 0
