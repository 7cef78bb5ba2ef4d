import pytest
import torch
from problems import threads

from llmq.algorithms.cholesky import cholesky_

SIZES = (1, 2, 127, 128, 129, 255, 256, 257, 600, 1300)


def positive(n, dtype=torch.float32, seed=0):
    """Moments of correlated numbers, damped like those of a layer's inputs."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * n + 8, n // 4 + 1, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(n // 4 + 1, n, generator=generator, dtype=torch.float64)
    A = X.T @ X / len(X)
    A.diagonal().add_(0.05 * A.diagonal().mean())
    return A.to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n", SIZES)
def test_factor_inverse_and_solutions_are_those_of_lapack(n, dtype, rtol):
    A = positive(n, dtype)
    B = torch.randn(7, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    L = torch.linalg.cholesky(A.double())
    factor = cholesky_(A.clone())
    assert (factor.L - L).norm() < rtol * L.norm()
    assert torch.equal(factor.L, factor.L.tril())
    X = torch.linalg.solve(A.double(), B.double().T).T
    assert (factor.solve_(B.clone()) - X).norm() < rtol * X.norm()
    V = torch.linalg.inv(L)
    assert (factor.invert_() - V).norm() < rtol * V.norm()
    assert torch.equal(factor.L, factor.L.tril())


@pytest.mark.parametrize("n", [96, 576, 1536])
def test_float32_is_as_exact_as_lapack(n):
    A = positive(n)
    exact = torch.linalg.inv(torch.linalg.cholesky(A.double()))
    lapack = torch.linalg.solve_triangular(torch.linalg.cholesky(A), torch.eye(n), upper=False)
    assert (cholesky_(A).invert_() - exact).norm() < 1.2 * (lapack - exact).norm()


def test_everything_happens_in_place_and_what_is_above_the_diagonal_is_not_read():
    A, B = positive(600), torch.randn(5, 600)
    lower = A.clone()
    lower[torch.ones_like(A).triu(1).bool()] = torch.nan
    L = cholesky_(A.clone()).L
    factor = cholesky_(lower)
    assert factor.L.data_ptr() == lower.data_ptr()
    assert torch.equal(lower, L)
    assert factor.solve_(B) is B
    assert factor.invert_() is lower


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [576, 1536])
def test_the_bits_do_not_change_with_the_number_of_threads(n, dtype):
    A = positive(n, dtype)
    B = torch.randn(272, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            factor = cholesky_(A.clone())
            found.append((factor.L.clone(), factor.solve_(B.clone()), factor.invert_()))
            assert torch.get_num_threads() == count
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_rows_are_solved_for_alike_together_and_apart():
    factor = cholesky_(positive(608))
    B = torch.randn(272, 608, generator=torch.Generator().manual_seed(1))
    together = factor.solve_(B.clone())
    assert torch.equal(torch.cat([factor.solve_(rows.clone()) for rows in B.split([16, 96, 160])]), together)


@pytest.mark.parametrize("at", [0, 1, 127, 128, 300, 511, 512, 599])
@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan, torch.inf])
def test_what_is_not_positive_definite_is_reported(value, at):
    A = positive(600)
    A[at, at] = value
    assert cholesky_(A) is None


def test_numbers_that_are_not_finite_off_the_diagonal_are_reported():
    for value in (torch.nan, torch.inf):
        A = positive(600)
        A[400, 30] = value
        assert cholesky_(A) is None


def test_the_number_of_threads_is_restored_after_failures(monkeypatch):
    A = positive(64)
    A[3, 3] = -1

    def broken(_):
        raise RuntimeError("broken")

    with threads(2):
        assert cholesky_(A) is None
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
        with pytest.raises(RuntimeError, match="broken"):
            cholesky_(A)
        assert torch.get_num_threads() == 2
