from dataclasses import replace

import pytest
import torch
from problems import correlated_inputs, loss, make_problem

from llmq.algorithms import gptq, rtn
from llmq.errors import WorkError
from llmq.settings import ORDERS, Gptq, Grid

SETTINGS = Gptq()
ONE_PASS = Gptq(passes=0)  # the paper's


def same(a, b):
    return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)


def naive_gptq(problem, damping):
    """Frantar et al., column by column in the group-aware order, with an explicit inverse that shrinks at each step."""
    W, H, size = problem.W.clone(), problem.statistics.H, problem.grid.group_size
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    diagonal = problem.statistics.H.diagonal().tolist()
    groups = [range(g, g + size) for g in range(0, len(H), size)]
    groups.sort(key=lambda group: -max(diagonal[c] for c in group))
    order = [c for group in groups for c in sorted(group, key=lambda c: -diagonal[c])]
    Q = torch.zeros(W.shape, dtype=torch.uint8)
    for step, c in enumerate(order):
        left = order[step:]
        Hinv = torch.linalg.inv(H[left][:, left])  # of the columns not yet rounded, c first
        if step % size == 0:
            scale, zero = problem.grid_of(W[:, left[:size]])
        w = W[:, c]
        Q[:, c] = torch.clamp(torch.round(w / scale.double() + zero), 0, 2**problem.grid.bits - 1)
        error = (w - scale.double() * (Q[:, c].double() - zero)) / Hinv[0, 0]
        W[:, left] -= torch.outer(error, Hinv[0])
    return Q


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 32), (4, 64), (8, 32)])
def test_agrees_code_for_code_with_a_naive_implementation_in_float64(bits, group_size, symmetric):
    sizes = {"bits": bits, "group_size": group_size}
    problem = make_problem(correlated_inputs(), **sizes, symmetric=symmetric, search="minmax")
    assert torch.equal(gptq.solve(problem, ONE_PASS).q, naive_gptq(problem, ONE_PASS.damping))


@pytest.mark.parametrize("group_size", [16, 64, 192])
@pytest.mark.parametrize("order", ORDERS)
def test_block_size_changes_nothing(order, group_size):
    problem = make_problem(correlated_inputs(width=192), group_size=group_size)
    whole = gptq.solve(problem, Gptq(block_size=192, order=order))
    for block_size in (1, 7, 64, 128):
        assert same(gptq.solve(problem, Gptq(block_size=block_size, order=order)), whole)


def test_stacked_linears_give_what_they_give_alone():
    problem = make_problem(correlated_inputs(dtype=torch.float32), rows=31)
    stacked = gptq.solve(problem, SETTINGS)
    for rows in (slice(0, 13), slice(13, 14), slice(14, 31)):
        alone = gptq.solve(replace(problem, W=problem.W[rows], clippable=problem.clippable[rows]), SETTINGS)
        assert torch.equal(alone.q, stacked.q[rows])
        assert torch.equal(alone.scale, stacked.scale[rows])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("order", ORDERS)
def test_diagonal_hessian_gives_round_to_nearest_in_any_order(order, search, symmetric):
    problem = make_problem(correlated_inputs(), symmetric=symmetric, search=search)
    problem.statistics.H = torch.diag(torch.rand(64, dtype=torch.float64) + 0.1)
    assert same(gptq.solve(problem, replace(SETTINGS, order=order)), rtn.solve(problem))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_grids_weighted_by_what_errors_cost_beat_the_others(order, bits, symmetric):
    settings, errors = replace(SETTINGS, order=order), {}
    for search in ("minmax", "mse", "hessian"):
        problem = make_problem(correlated_inputs(outliers=3), rows=96, bits=bits, symmetric=symmetric, search=search)
        errors[search] = loss(problem, gptq.solve(problem, settings))
    assert errors["hessian"] < 0.98 * min(errors["mse"], errors["minmax"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_strictly_below_rtn_on_correlated_inputs(bits, symmetric, dtype):
    problem = make_problem(correlated_inputs(dtype=dtype), bits=bits, symmetric=symmetric)
    assert loss(problem, gptq.solve(problem, SETTINGS)) < 0.9 * loss(problem, rtn.solve(problem))


def test_factor_of_the_inverse_needs_one_cholesky():
    X = correlated_inputs()
    H = X.T @ X / len(X)
    U, damping, fallbacks = gptq.factorise(H, 0.05)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    assert torch.allclose(U.T @ U, torch.linalg.inv(damped), rtol=1e-10, atol=1e-12)
    assert torch.equal(U, U.triu())
    assert (damping, fallbacks) == (0.05, [])


def test_orders_visit_the_loudest_first_and_the_group_aware_one_keeps_groups_whole():
    diagonal = torch.tensor([1.0, 5, 2, 2, 9, 0, 3, 3])
    assert gptq.visiting_order("group", diagonal, 4).tolist() == [4, 6, 7, 5, 1, 2, 3, 0]
    assert gptq.visiting_order("group", diagonal, 8).tolist() == [4, 1, 6, 7, 2, 3, 0, 5]
    assert gptq.visiting_order("group", diagonal, 1).tolist() == [4, 1, 6, 7, 2, 3, 0, 5]
    assert gptq.visiting_order("static", diagonal, 4).tolist() == [4, 1, 6, 7, 2, 3, 0, 5]
    assert gptq.visiting_order("natural", diagonal, 4).tolist() == list(range(8))


def test_dead_channels_are_rounded_to_nearest_and_reported():
    X = correlated_inputs()
    X[:, [3, 40]] = 0
    problem = make_problem(X, search="minmax")
    before = problem.statistics.H.clone()
    solution = gptq.solve(problem, SETTINGS)
    W_hat = solution.dequantize(32)
    steps = solution.scale.abs().repeat_interleave(32, dim=1)
    assert ((problem.W - W_hat).abs()[:, [3, 40]] <= 1.001 * steps[:, [3, 40]]).all()
    assert solution.fallbacks == ["2 input channels never active: rounded to nearest"]
    assert torch.equal(problem.statistics.H, before)  # shared: never damped in place


def test_no_activations_at_all_still_gives_round_to_nearest():
    problem = make_problem(correlated_inputs(), search="mse")
    problem.statistics.H = torch.zeros(64, 64, dtype=torch.float64)
    assert torch.equal(gptq.solve(problem, SETTINGS).q, rtn.solve(problem).q)


def test_float64_rescues_what_float32_cannot_factorise():
    # Integers make H exact. Its rank is 4, and damping by 1e-9 of the mean is lost in float32's 24 bits.
    X = torch.randint(-9, 10, (4, 64), generator=torch.Generator().manual_seed(0)).float()
    _, damping, fallbacks = gptq.factorise(X.T @ X, 1e-9)
    assert damping == 1e-9
    assert fallbacks == ["Cholesky failed in float32 at damping 1e-09"]


def test_more_damping_is_tried_in_order_and_recorded():
    H = torch.eye(8)
    H[0, 0] = -0.06  # an eigenvalue that 5 % of the mean diagonal leaves negative and 10 % makes positive
    _, damping, fallbacks = gptq.factorise(H, 0.05)
    assert damping == 0.1
    assert [text.split(" at ")[1] for text in fallbacks] == ["damping 0.05", "damping 0.05"]


def test_statistics_that_are_not_numbers_are_an_error_and_not_a_checkpoint():
    problem = make_problem(correlated_inputs())
    problem.statistics.H[0, 0] = torch.nan
    with pytest.raises(WorkError, match="not finite or not positive"):
        gptq.solve(problem, SETTINGS)


def test_nothing_changes_with_the_number_of_threads():
    problem = make_problem(correlated_inputs(width=256, dtype=torch.float32), rows=320, group_size=64)
    kept = torch.get_num_threads()
    try:
        solutions = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            solutions.append(gptq.solve(problem, SETTINGS))
    finally:
        torch.set_num_threads(kept)
    assert same(solutions[0], solutions[1])
    assert same(solutions[0], solutions[2])


def test_whole_rows_can_be_one_group():
    problem = make_problem(correlated_inputs())
    problem = replace(problem, grid=Grid(4, 64, True))
    assert gptq.solve(problem, SETTINGS).scale.shape == (24, 1)
