import pytest
import torch
from problems import correlated_inputs, loss, make_problem, threads

from llmq.algorithms import rtn, stable_sums
from llmq.algorithms.stable_sums import computable, energy, inner, lost_energy, mean, strips


def _energies(problem, solution):
    H = problem.statistics.H
    return [*map(float, (energy(problem.W, H), energy(problem.W, None), lost_energy(problem, solution, H)))]


def test_energies_are_summed_in_one_order(monkeypatch):
    problem = make_problem(correlated_inputs(width=192, dtype=torch.float32), rows=400)
    solution, found = rtn.solve(problem), []
    for count in (1, 2, 3):
        with threads(count):
            found.append(_energies(problem, solution))
    assert found[0] == found[1] == found[2]
    assert found[0][2] == pytest.approx(loss(problem, solution), rel=1e-4)
    monkeypatch.setattr(stable_sums, "_ROWS", 48)
    assert _energies(problem, solution) == pytest.approx(found[0], rel=1e-12)


def test_means_of_long_diagonals_are_summed_in_one_order():
    terms, found = torch.rand(100_001, generator=torch.Generator().manual_seed(0)), []
    for count in (1, 2, 3):
        with threads(count):
            found.append(float(mean(terms)))
    assert found[0] == found[1] == found[2] == pytest.approx(float(terms.double().mean()), rel=1e-12)


def test_an_inner_product_is_summed_in_one_order():
    A, B = torch.randn(2, 300, 4096, generator=torch.Generator().manual_seed(0))
    sums = []
    for count in (1, 2, 3):
        with threads(count):
            sums.append(float(inner(A, B)))
    assert sums[0] == sums[1] == sums[2] == pytest.approx(float((A.double() * B.double()).sum()), rel=1e-5)


def test_strips_cover_every_row_once_even_where_a_row_is_longer_than_a_strip(monkeypatch):
    monkeypatch.setitem(stable_sums._WEIGHTS, "cpu", 10)
    for rows, width in ((7, 3), (7, 64), (0, 3)):
        W = torch.arange(rows * width).view(rows, width)
        assert [row for strip in strips(W) for row in W[strip].tolist()] == W.tolist()
    assert strips(torch.empty(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 9)]


def test_only_weights_stored_in_fewer_bits_are_widened():
    widened = {dtype: computable(torch.ones(2, dtype=dtype)).dtype for dtype in (torch.float16, torch.bfloat16)}
    assert set(widened.values()) == {torch.float32}
    assert computable(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
