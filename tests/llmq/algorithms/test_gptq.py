import weakref
from dataclasses import replace

import pytest
import torch
from problems import correlated_inputs, loss, make_problem, threads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmq.algorithms import cholesky, gptq, rtn
from llmq.algorithms.problem import joined
from llmq.core.errors import WorkError
from llmq.core.settings import ORDERS, Gptq, Grid

SETTINGS = Gptq()
ONE_PASS = Gptq(passes=0)  # the paper's


def same(a, b):
    return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)


def factorise(H, damping):
    return gptq.factorise(H, H.diagonal(), torch.arange(len(H)), damping)


class LargestSum(TorchDispatchMode):
    """The most bytes that tensors made meanwhile have held at once, temporaries of single operations aside."""

    def __init__(self, *existing):
        super().__init__()
        self.alive = {each.untyped_storage()._cdata for each in existing}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            storage = each.untyped_storage() if isinstance(each, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def freed(self, key, size):
        self.alive.discard(key)
        self.now -= size


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
    U, damping, fallbacks = factorise(H, 0.05)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    assert torch.allclose(U.T @ U, torch.linalg.inv(damped), rtol=1e-10, atol=1e-12)
    assert torch.equal(U, U.triu())
    assert (damping, fallbacks) == (0.05, [])


@pytest.mark.parametrize("n", [1, 7, 64])
def test_the_factor_follows_the_order_and_takes_the_diagonal_that_it_is_given(n, monkeypatch):
    monkeypatch.setattr(gptq, "_ROWS", 5)
    X = correlated_inputs(width=64)[:, :n]
    H, order = X.T @ X / len(X), torch.randperm(n, generator=torch.Generator().manual_seed(0))
    diagonal = H.diagonal() + torch.arange(n)
    U, _, _ = gptq.factorise(H, diagonal, order, 0.05)
    damped = H - torch.diag(H.diagonal()) + torch.diag(diagonal + 0.05 * diagonal.mean())
    assert torch.allclose(U.T @ U, torch.linalg.inv(damped[order][:, order]), rtol=1e-10, atol=1e-12)


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
    _, damping, fallbacks = factorise(X.T @ X, 1e-9)
    assert damping == 1e-9
    assert fallbacks == ["Cholesky failed in float32 at damping 1e-09"]


def test_more_damping_is_tried_in_order_and_recorded():
    H = torch.eye(8)
    H[0, 0] = -0.06  # an eigenvalue that 5 % of the mean diagonal leaves negative and 10 % makes positive
    _, damping, fallbacks = factorise(H, 0.05)
    assert damping == 0.1
    assert [text.split(" at ")[1] for text in fallbacks] == ["damping 0.05", "damping 0.05"]


def test_statistics_that_are_not_numbers_are_an_error_and_not_a_checkpoint():
    problem = make_problem(correlated_inputs())
    problem.statistics.H[0, 0] = torch.nan
    with pytest.raises(WorkError, match="not finite or not positive"):
        gptq.solve(problem, SETTINGS)


@pytest.mark.parametrize(("rows", "width", "bits"), [(320, 256, 4), (96, 1536, 2)])
def test_nothing_changes_with_the_number_of_threads(rows, width, bits):
    X = correlated_inputs(tokens=2 * width, width=width, dtype=torch.float32)
    problem, found = make_problem(X, rows=rows, bits=bits, group_size=64), []
    for count in (1, 2, 3):
        with threads(count):
            # Other bits of U seldom become other codes, but they do in a large model.
            found.append((gptq.solve(problem, SETTINGS), factorise(problem.statistics.H, 0.05)[0]))
    for solution, U in found[1:]:
        assert same(solution, found[0][0])
        assert torch.equal(U, found[0][1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_solved_apart_get_the_codes_they_get_together(bits, order):
    X = correlated_inputs(tokens=1024, width=576, dtype=torch.float32)
    problem, settings = make_problem(X, rows=272, bits=bits, group_size=64), Gptq(order=order)
    together = gptq.solve(problem, settings)
    for stops in ((16, 272), (96, 112, 272)):
        parts = [problem.rows(start, stop) for start, stop in zip((0, *stops), stops, strict=False)]
        assert same(joined([gptq.solve(part, settings) for part in parts]), together)


def test_rows_are_taken_in_parts(monkeypatch):
    problem = make_problem(correlated_inputs(dtype=torch.float32), rows=80)
    whole = gptq.solve(problem, SETTINGS)
    monkeypatch.setattr(gptq, "_ROWS_PER_SOLVE", 32)
    parts = gptq.solve(problem, SETTINGS)
    assert same(parts, whole)
    assert (parts.damping, parts.fallbacks) == (whole.damping, whole.fallbacks)


@pytest.mark.parametrize("order", ORDERS)
def test_beside_h_there_is_one_more_matrix_of_its_size_at_a_time(order, monkeypatch):
    for module, name in ((gptq, "_ROWS"), (cholesky, "_STRIP")):
        monkeypatch.setattr(module, name, 32)
    n = 768
    problem = make_problem(correlated_inputs(tokens=n, width=n, dtype=torch.float32), rows=16, group_size=64)
    problem.statistics.H[3] = problem.statistics.H[:, 3] = 0  # a dead channel
    H = problem.statistics.H.clone()
    with LargestSum(problem.W, problem.statistics.H) as made:
        gptq.solve(problem, Gptq(order=order))
    assert made.peak < 1.7 * n * n * 4  # blocks of 128 columns are a sixth of it
    assert torch.equal(problem.statistics.H, H)


def test_whole_rows_can_be_one_group():
    problem = make_problem(correlated_inputs())
    problem = replace(problem, grid=Grid(4, 64, True))
    assert gptq.solve(problem, SETTINGS).scale.shape == (24, 1)
