"""Check that the benchmark's comparison with float64 notices mistakes of kernels."""

import pytest
import torch
from bench import correctness
from bench.plan import TOY
from llmq_kernels import dequantize_matmul, reference


@pytest.fixture
def kernels(monkeypatch):
    """Replace the kernels by plain torch that writes into y. A test may spoil the result."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def multiply(x, weight, tile, counters, y):
        y.copy_(reference.matmul(x.float(), weight))
        multiply.spoil(y, counters)
        return y

    def dequantize_rows(weight, W, first_row):
        W.copy_(reference.dequantize(weight, torch.float32)[first_row : first_row + len(W)])

    multiply.spoil = lambda y, counters: None
    monkeypatch.setattr(correctness, "multiply", multiply)
    monkeypatch.setattr(dequantize_matmul, "dequantize_rows", dequantize_rows)
    return multiply


JOB = correctness.Job(True, 4, 32, "float16", True)


def test_right_results_pass(kernels):
    row = correctness.check(JOB)
    assert row["wrong"] == row["skipped"] == []
    assert row["cases"] == 2
    assert 1e-5 < row["error"] < 3e-4


def fails_sometimes(y, counters):
    y[0, 0] += 0.01 * next(CALLS)


CALLS = iter(range(10**6))
SPOILED = {
    "one_number": (lambda y, counters: y[0, -1].add_(1), "error"),
    "unwritten": (lambda y, counters: y[-1, -1].fill_(float("nan")), "error nan"),
    "a_percent": (lambda y, counters: y.mul_(1.01), "error 9.9"),
    "changing": (fails_sometimes, "runs gave different bits"),
    "counters": (lambda y, counters: counters[3].add_(1), "counters are not zero"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILED.values(), ids=SPOILED)
def test_a_wrong_result_is_found(kernels, spoil, said):
    kernels.spoil = spoil
    wrong = correctness.check(JOB)["wrong"]
    assert len(wrong) >= 2
    assert said in wrong[0]


def test_a_kernel_that_cannot_run_is_wrong_and_the_rest_is_checked(kernels):
    def spoil(y, counters):
        if len(y.T) == TOY.grid.outputs:
            raise OSError("illegal memory access")

    kernels.spoil = spoil
    row = correctness.check(JOB)
    assert all("illegal memory access" in what for what in row["wrong"])
    assert len(row["wrong"]) == 2  # the product and its twin
    assert row["cases"] == 1
