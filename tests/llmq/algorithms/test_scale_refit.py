from dataclasses import replace

import pytest
import torch
from problems import correlated_inputs, loss, make_problem

from llmq.algorithms import gptq, rtn
from llmq.algorithms.problem import damped
from llmq.algorithms.scale_refit import refit_scales
from llmq.core import affine_grid
from llmq.core.settings import Gptq


def codes(solution, size):
    return solution.q.double().unflatten(1, (-1, size)) - solution.zero.double()[..., None]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "width"), [(2, 16, 64), (3, 32, 160), (4, 37, 37 * 7), (8, 64, 64)])
def test_the_objective_falls_and_only_scales_change(bits, group_size, width, symmetric):
    problem = make_problem(correlated_inputs(width=width), bits=bits, group_size=group_size, symmetric=symmetric)
    before = gptq.solve(problem, Gptq())
    after = refit_scales(problem, before, problem.statistics.H)
    assert loss(problem, after) < loss(problem, before)
    assert torch.equal(after.q, before.q)
    assert torch.equal(after.zero, before.zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_objective_falls_further_where_zero_points_are_no_codes(bits, dtype):
    problem = make_problem(correlated_inputs(), bits=bits, symmetric=False)
    problem.grid, problem.scale_dtype = replace(problem.grid, real_zeros=True), dtype
    before = gptq.solve(problem, Gptq())
    after = refit_scales(problem, before, problem.statistics.H)
    kept = replace(after, zero=affine_grid.storable_zero(after.scale, before.zero))  # as if only scales were fitted
    assert loss(problem, after) < min(loss(problem, before), loss(problem, kept))
    assert torch.equal(after.q, before.q)
    assert torch.equal(affine_grid.storable_zero(after.scale, after.zero), after.zero)


def test_many_sweeps_reach_the_least_squares_solution(monkeypatch):
    monkeypatch.setattr("llmq.algorithms.scale_refit._SWEEPS", 300)
    problem = make_problem(correlated_inputs(width=48), rows=3, bits=3, group_size=16)
    solution = rtn.solve(problem)
    H = damped(problem.statistics.H, 0.05)
    fitted = refit_scales(problem, solution, H).scale
    for row, c in enumerate(codes(solution, 16)):
        spread = torch.block_diag(*c)  # [groups, in]: ŵ = s · spread
        exact = torch.linalg.solve(spread @ H @ spread.T, spread @ H @ problem.W[row])
        torch.testing.assert_close(fitted[row].double(), exact, rtol=1e-5, atol=0)


def test_one_group_is_fitted_exactly_and_groups_without_codes_keep_their_scale():
    problem = make_problem(torch.eye(32, dtype=torch.float64), rows=2, group_size=32)
    solution = rtn.solve(problem)
    solution = replace(solution, q=solution.q.clone())
    solution.q[1] = solution.zero[1]
    c = codes(solution, 32)[0, 0]
    fitted = refit_scales(problem, solution, problem.statistics.H).scale
    assert fitted[0, 0] == (c @ problem.W[0] / (c @ c)).float()
    assert fitted[1, 0] == solution.scale[1, 0]


def test_a_scale_that_cannot_be_stored_any_better_stays():
    problem = make_problem(correlated_inputs(), group_size=64)
    settled = gptq.solve(problem, Gptq())
    problem.scale_dtype = torch.bfloat16
    coarse = replace(settled, scale=settled.scale.to(torch.bfloat16))
    for _ in range(8):
        coarse = refit_scales(problem, coarse, problem.statistics.H)
    assert torch.equal(refit_scales(problem, coarse, problem.statistics.H).scale, coarse.scale)


def test_rows_are_fitted_one_by_one():
    problem = make_problem(correlated_inputs(), rows=7, bits=2)
    solution = gptq.solve(problem, Gptq())
    together = refit_scales(problem, solution, problem.statistics.H).scale
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    moved = replace(problem, W=problem.W[order], clippable=problem.clippable[order])
    turned = replace(solution, q=solution.q[order], scale=solution.scale[order], zero=solution.zero[order])
    assert torch.equal(refit_scales(moved, turned, problem.statistics.H).scale, together[order])
