"""Rounding problems for the algorithm tests."""

from contextlib import contextmanager

import torch

from llmq.algorithms.problem import Problem
from llmq.calibration.input_statistics import InputStatistics
from llmq.core.settings import Grid


def correlated_inputs(tokens=512, width=64, seed=0, dtype=torch.float64, outliers=0):
    """X [tokens, width] with strong correlations, like hidden states, and a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    X = torch.randn(tokens, width // 4, generator=generator, dtype=torch.float64) @ mixing[: width // 4]
    X = X + 0.3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    X[:, :outliers] *= 20
    return X.to(dtype)


def make_problem(X, rows=24, bits=4, group_size=32, symmetric=True, seed=1, search="auto"):
    """A random stacked weight with the statistics of X."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, X.shape[1], generator=generator, dtype=torch.float64).to(X.dtype)
    H = X.T @ X / len(X)
    stats = InputStatistics(H, H, len(X), 0, mean_abs=X.abs().mean(0))
    scale_dtype = torch.float32 if X.dtype == torch.float64 else torch.float16
    return Problem(W, stats, Grid(bits, group_size, symmetric, search), scale_dtype, torch.ones(rows, dtype=torch.bool))


def loss(problem, solution):
    """tr(ΔW H ΔWᵀ), written out."""
    E = problem.W - solution.dequantize(problem.grid.group_size).to(problem.W.dtype)
    return float(torch.trace(E @ problem.statistics.H @ E.T))


@contextmanager
def threads(count):
    """Work with so many of them inside."""
    kept = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(kept)
