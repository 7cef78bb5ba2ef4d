"""Sums of products: exact factors of 16 bits, float32 sums, on a CPU and on a simulated GPU."""

import pytest
import torch
from fake_gpu import GPU, FakeGpu
from problems import make_problem, threads

from llmq.algorithms import gptq
from llmq.calibration import products
from llmq.calibration.products import add_lower, mirrored
from llmq.core.settings import Gptq


def inputs(dtype, tokens=1024, width=320):
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    return (torch.randn(tokens, width, generator=generator) @ mixing * scales).to(dtype)


def summed(X, batches=4):
    H = torch.zeros(X.shape[1], X.shape[1], device=X.device)
    for rows in X.chunk(batches):
        add_lower(H, rows)
    return mirrored(H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_sum_is_that_of_float64(device, dtype, monkeypatch):
    monkeypatch.setattr(products, "_GPU_STRIP", 128)  # several strips, the last one narrower
    X = inputs(dtype)
    exact = X.double().T @ X.double()
    if device == "gpu":
        with FakeGpu() as gpu:
            H = summed(X.to(GPU)).inner
        assert gpu.waits == []
    else:
        H = summed(X)
    assert torch.equal(H, H.T)
    # Products of factors that were rounded to bfloat16 on the way would be wrong by 1e-3.
    assert (H.double() - exact).norm() / exact.norm() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_are_those_of_a_sum_in_float64(dtype):
    X = inputs(dtype)
    found = []
    for H in (summed(X), (X.double().T @ X.double()).float()):
        problem = make_problem(X.float(), rows=128)
        problem.statistics.H = H / len(X)
        found.append(gptq.solve(problem, Gptq()).q)
    assert (found[0] == found[1]).float().mean() >= 0.999


def test_sums_of_bfloat16_do_not_depend_on_the_number_of_threads():
    X, found = inputs(torch.bfloat16, width=512), []
    for count in (1, 2, 3):
        with threads(count):
            found.append(summed(X))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
