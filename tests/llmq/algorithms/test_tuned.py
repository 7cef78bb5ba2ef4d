import json

import pytest
import torch
from problems import correlated_inputs, make_problem
from small_runs import run
from torch import nn

from llmq.algorithms import gptq
from llmq.algorithms.problem import round_to_nearest
from llmq.algorithms.tuned import latent_of, refine
from llmq.calibration.block_runner import Block, Compute
from llmq.checkpoint.output_dir import REPORT
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.settings import Gptq, Tuned
from llmq.models.block_structure import Group


class OneLinear(nn.Module):
    def __init__(self, W):
        super().__init__()
        self.a = nn.Linear(*reversed(W.shape), bias=False)
        self.a.weight.data = W

    def forward(self, hidden):
        return self.a(hidden)


def layer(bits=2, symmetric=True, tokens=512):
    """A block of one linear in 8 micro-batches, the last 2 held out, and its GPTQ problem and solution."""
    X = correlated_inputs(tokens=tokens, dtype=torch.float32)
    problem = make_problem(X, rows=64, bits=bits, symmetric=symmetric)
    hidden = list(X.view(8, 1, -1, X.shape[1]))
    original = [h @ problem.W.T for h in hidden]
    block = Block("b", OneLinear(problem.W), hidden, 6, ((), {}), Compute(torch.device("cpu")), original)
    return block, problem, gptq.solve(problem, Gptq())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_training_starts_from_the_very_solution(bits, symmetric):
    _, problem, solution = layer(bits, symmetric)
    rounded = latent_of(problem, solution).rounded()
    assert torch.equal(rounded.q, solution.q)
    assert torch.equal(rounded.scale, solution.scale)
    assert torch.equal(latent_of(problem, solution)(), solution.dequantize(problem.grid.group_size))


def test_gradients_pass_where_a_code_can_follow_them():
    _, problem, solution = layer()
    latent = latent_of(problem, solution)
    with torch.no_grad():
        latent.V[0, 0, :4] = torch.tensor([-0.7, -0.4, 3.4, 3.6])
    latent.requires_grad_()
    latent().sum().backward()
    assert (latent.V.grad[0, 0, :4] != 0).tolist() == [False, True, True, False]
    torch.testing.assert_close(latent.V.grad[0, 0, 1], latent.scale[0, 0, 0])
    codes = latent.V.detach().round().clamp(0, 3) - latent.zero
    torch.testing.assert_close(latent.factor.grad, latent.scale * codes.sum(-1, keepdim=True))


@pytest.mark.parametrize("bits", [2, 3])
def test_training_lowers_the_held_out_error_and_says_by_how_much(bits):
    block, problem, _ = layer(bits, tokens=4096)
    solution = round_to_nearest(problem)
    (found,), (before, after) = refine(block, [Group(("a",))], [problem], [solution], Tuned(steps=60, batch=2))
    assert after < 0.8 * before
    assert not torch.equal(found.q, solution.q)
    assert found.scale.dtype == problem.scale_dtype
    for each, claimed in ((solution, before), (found, after)):
        errors = []
        for h, y in zip(block.hidden[6:], block.original[6:], strict=True):
            E = (h @ each.dequantize(problem.grid.group_size).T - y).square().sum(-1)
            errors.append((E / (y.square().sum(-1) + E)).mean())
        assert abs(float(sum(errors)) / 2 - claimed) < 1e-6 * claimed


def test_a_start_that_training_only_makes_worse_is_kept():
    block, problem, solution = layer()
    (found,), (before, after) = refine(block, [Group(("a",))], [problem], [solution], Tuned(steps=5, rate=50.0))
    assert found is solution
    assert after == before


def test_a_models_blocks_become_better_and_the_report_tells_of_the_result(tmp_path, llama, text_file):
    settings = Tuned(steps=30, rate=0.005)
    output = run(llama, text_file, tmp_path / "out", method="tuned", bits=2, samples=200, tuned=settings)
    report = json.loads((output / REPORT).read_text())
    assert len(report["refined"]) == 2
    assert all(after <= before for before, after in report["refined"].values())
    assert any(after < before for before, after in report["refined"].values())
    plain = json.loads((run(llama, text_file, tmp_path / "gptq", bits=2, samples=200) / REPORT).read_text())
    assert [group["error"] for group in report["groups"]] != [group["error"] for group in plain["groups"]]


def test_learned_rounding_needs_something_to_hold_out(tmp_path):
    with pytest.raises(RequestError, match="samples must be at least 2"):
        QuantizeConfig(model="demo", output=tmp_path, method="tuned", samples=1)
    for changes in ({"effort": "fast"}, {"without": ("match",)}):
        with pytest.raises(RequestError, match="tuned follows the original model's outputs"):
            QuantizeConfig(model="demo", output=tmp_path, method="tuned", **changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": -1},
        {"end_batch": 0},
        {"rate": -1.0},
        {"scale_rate": float("nan")},
        {"rate": 0.0, "scale_rate": 0.0},
        {"end_rate": 0.0, "end_scale_rate": 0.0},
    ],
)
def test_settings_that_cannot_train_are_refused(settings):
    with pytest.raises(RequestError, match="tuned"):
        Tuned(**settings)


def test_a_block_in_bfloat16_is_trained_too():
    block, problem, _ = layer(tokens=2048)
    block.module.bfloat16()
    block.hidden, block.original = ([h.bfloat16() for h in each] for each in (block.hidden, block.original))
    block.compute = Compute(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    solution = round_to_nearest(problem)
    _, (before, after) = refine(block, [Group(("a",))], [problem], [solution], Tuned(steps=60))
    assert after < 0.9 * before
