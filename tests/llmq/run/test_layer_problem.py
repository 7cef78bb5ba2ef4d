"""The problem of a group of linears: stacked, solved in rows or as a whole, split again, and its error."""

from pathlib import Path

import pytest
import torch
from problems import correlated_inputs, make_problem
from torch import nn

from llmq.algorithms import ALGORITHMS, rtn
from llmq.algorithms.output_matching import Match, choose, matched
from llmq.calibration.block_runner import Block, Compute
from llmq.core.config import QuantizeConfig
from llmq.core.distributed import ALONE
from llmq.core.settings import Grid
from llmq.models.block_structure import Group
from llmq.run.layer_problem import errors_of, matched_problem, pad, solve_in_first, solve_rows, weights_of
from llmq.run.layer_problem import make_problem as problem_of

GROUP = Group(("attn.q_proj", "attn.k_proj", "attn.v_proj"))


@pytest.fixture
def block():
    torch.manual_seed(0)
    module = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(64, 32), "k_proj": nn.Linear(64, 16)})})
    module["attn"]["v_proj"] = nn.Linear(64, 48)
    module = module.to(torch.bfloat16)
    return Block("block", module, [torch.zeros(1, 2, 64)], 1, ((), {}), Compute(torch.device("cpu")))


def test_linears_are_stacked_and_queries_and_keys_are_not_to_be_clipped(block):
    problem = problem_of(block, GROUP, None, Grid(4, -1), torch.float16)
    stacked = torch.cat([linear.weight for linear in block.module["attn"].values()])
    assert torch.equal(problem.W, stacked)
    assert problem.W.dtype == torch.bfloat16  # as stored: nothing is summed
    assert problem.grid.group_size == 64
    assert problem.clippable.tolist() == [False] * 48 + [True] * 48
    statistics = make_problem(correlated_inputs(dtype=torch.float32)).statistics
    assert problem_of(block, GROUP, statistics, Grid(), torch.float16).W.dtype == torch.float32


def test_a_solution_is_split_into_the_weights_of_the_linears_that_were_stacked(block):
    problem = problem_of(block, GROUP, None, Grid(3, 32), torch.float16)
    solution = rtn.solve(problem)
    weights = weights_of(block, GROUP, solution, 3)
    assert list(weights) == list(GROUP.linears)
    assert [len(weight.q) for weight in weights.values()] == [32, 16, 48]
    assert {weight.bits for weight in weights.values()} == {3}
    together = torch.cat([weight.dequantize() for weight in weights.values()])
    assert torch.equal(together.float(), solution.dequantize(32).to(together.dtype).float())


def test_matched_weights_replace_the_old_ones_and_what_they_came_from_is_gone():
    problem = make_problem(correlated_inputs(dtype=torch.float32))
    moment = 0.1 * problem.W @ problem.statistics.H
    problem.statistics.target_moment, problem.statistics.target_moment_val = moment, moment.clone()
    match, before = choose(problem), problem.W.clone()
    rows = matched_problem(problem, match, slice(8, 20))
    assert torch.equal(rows.W, matched(problem.rows(8, 20), match))
    assert not torch.equal(rows.W, before[8:20])
    assert (rows.statistics.target_moment, rows.statistics.target_moment_val) == (None, None)
    assert torch.equal(problem.W, before)
    assert problem.statistics.target_moment is moment


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
def test_rows_solved_apart_are_those_of_the_whole_and_so_are_their_errors(method):
    config, algorithm = QuantizeConfig(model="m", output=Path("out"), method=method), ALGORITHMS[method]
    problem = make_problem(correlated_inputs(dtype=torch.float32), rows=32)
    whole, errors = solve_in_first(problem, algorithm, config, ALONE)
    rows, errors_of_rows = solve_rows(problem, [slice(0, 32)], algorithm, config, ALONE)
    assert all(torch.equal(getattr(whole, name), getattr(rows, name)) for name in ("q", "scale", "zero"))
    assert errors == errors_of_rows == errors_of(problem, whole, algorithm.is_nearest(config), ALONE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
def test_rows_of_zeros_change_neither_codes_nor_errors(method, symmetric):
    """3352 rows have no whole number of 16: products would sum the last ones in another way on some threads."""
    config, algorithm = QuantizeConfig(model="m", output=Path("out"), method=method), ALGORITHMS[method]
    problem = make_problem(correlated_inputs(dtype=torch.float32), rows=40, symmetric=symmetric)
    moment = 0.1 * problem.W @ problem.statistics.H
    problem.statistics.target_moment, problem.statistics.target_moment_val = moment, moment.clone()
    longer = pad(problem)
    assert [len(part) for part in (longer.W, longer.clippable, longer.statistics.target_moment)] == [48] * 3
    assert pad(longer) is longer
    match = choose(longer)
    assert match == choose(problem)
    solved, errors = solve_in_first(matched_problem(longer, match, slice(0, 48)), algorithm, config, ALONE)
    exact, errors_without = solve_in_first(matched_problem(problem, match, slice(0, 40)), algorithm, config, ALONE)
    assert all(torch.equal(getattr(solved, name)[:40], getattr(exact, name)) for name in ("q", "scale", "zero"))
    assert errors == pytest.approx(errors_without, rel=1e-6)


def test_weights_that_have_nowhere_to_go_stay():
    problem = make_problem(correlated_inputs(dtype=torch.float32))
    assert torch.equal(matched_problem(problem, Match(0.05, 0.0), slice(0, 24)).W, problem.W)


def test_the_relative_error_is_the_lost_share_of_the_output_energy():
    X = correlated_inputs()
    problem = make_problem(X)
    solution = rtn.solve(problem)
    lost, whole = X @ (problem.W - solution.dequantize(32).double()).T, X @ problem.W.T
    expected = float(lost.square().sum() / whole.square().sum())
    error, nearest = errors_of(problem, solution, False, ALONE)
    assert abs(error / expected - 1) < 1e-12
    assert error < nearest  # which does not search for its grid
    assert errors_of(problem, solution, True, ALONE) == (error, error)
    problem.W.zero_()
    assert errors_of(problem, rtn.solve(problem), True, ALONE) == (0, 0)
