import pytest
import torch
from problems import correlated_inputs, loss, make_problem, threads
from tiny import save_tiny

from llmq.algorithms import awq
from llmq.algorithms.problem import Problem, joined, round_to_nearest
from llmq.calibration.block_runner import Compute
from llmq.calibration.block_stream import stream
from llmq.calibration.input_statistics import collect_statistics
from llmq.calibration.texts import Tokens
from llmq.core import grid
from llmq.core.settings import Awq, Grid
from llmq.core.timing import Clock
from llmq.models import block_structure
from llmq.models.block_structure import find_groups, linear_of
from llmq.models.model_source import ModelSource

CPU = torch.device("cpu")


def scaled_loss(problem, s):
    """tr(ΔW H ΔWᵀ) with ΔW = Q(W s)/s - W, written out."""
    W = grid.group_view(problem.W * s, problem.grid.group_size)
    scale, zero = problem.grid_of(W)
    q = grid.quantize(W, scale[..., None], zero[..., None], problem.grid.bits)
    E = grid.dequantize(q, scale[..., None], zero[..., None], W.dtype).flatten(1) / s - problem.W
    return float(torch.trace(E @ problem.statistics.H @ E.T))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_with_outlier_channels_the_scaled_error_is_strictly_below_rtn(bits, symmetric):
    problem = make_problem(correlated_inputs(outliers=6), bits=bits, symmetric=symmetric)
    s = awq.search_scales(problem, 20)
    assert scaled_loss(problem, s) < 0.8 * loss(problem, round_to_nearest(problem))
    assert s[:6].min() > s[6:].max()  # loud channels get the finer grid


def test_the_search_takes_the_best_of_its_ratios():
    problem = make_problem(correlated_inputs(outliers=6))
    x = problem.statistics.mean_abs
    tried = [x ** (step / 20) for step in range(20)]
    best = min(scaled_loss(problem, s / (s.max() * s.min()).sqrt()) for s in tried)
    assert scaled_loss(problem, awq.search_scales(problem, 20)) == best


def test_ratio_zero_alone_is_rtn():
    problem = make_problem(correlated_inputs(outliers=6))
    assert torch.equal(awq.search_scales(problem, 1), torch.ones(64, dtype=torch.float64))
    assert torch.equal(awq.solve(problem, Awq(clip_steps=0)).q, round_to_nearest(problem).q)
    assert torch.equal(awq.solve(problem, Awq(clip_steps=1)).q, round_to_nearest(problem).q)


def test_clipping_lowers_the_error_of_each_group_and_spares_queries_and_keys():
    problem = make_problem(correlated_inputs(), bits=2)
    problem.clippable[:5] = False
    clipped, plain = awq.solve(problem, Awq()), round_to_nearest(problem)
    H = problem.statistics.H
    for start in (0, 32):
        H_gg = H[start : start + 32, start : start + 32]
        errors = [
            (((problem.W - s.dequantize(32))[:, start : start + 32] @ H_gg)
             * (problem.W - s.dequantize(32))[:, start : start + 32]).sum(1)
            for s in (clipped, plain)
        ]  # fmt: skip
        assert (errors[0] <= errors[1] * (1 + 1e-12)).all()
        assert (errors[0][5:] < errors[1][5:]).any()
    assert torch.equal(clipped.q[:5], plain.q[:5])
    assert not torch.equal(clipped.q[5:], plain.q[5:])


def test_rows_are_clipped_alike_together_and_apart_by_any_number_of_threads():
    problem = make_problem(correlated_inputs(width=192, dtype=torch.float32), rows=272, bits=3)
    problem.clippable[:100] = False
    together = awq.solve(problem, Awq())
    parts = [problem.rows(start, stop) for start, stop in ((0, 16), (16, 112), (112, 272))]
    for count in (1, 2, 3):
        with threads(count):
            for solution in (awq.solve(problem, Awq()), joined([awq.solve(part, Awq()) for part in parts])):
                assert torch.equal(solution.q, together.q)
                assert torch.equal(solution.scale, together.scale)


def first_block(directory, dtype=torch.float32):
    ids = torch.randint(2, 300, (20, 64), generator=torch.Generator().manual_seed(0))
    source = ModelSource(str(directory))
    block = next(stream(source, Tokens(ids[:-2], ids[-2:]), Compute(CPU, dtype, dtype), Clock()))
    block.module.requires_grad_(False)
    groups = find_groups(block.module, block.run, block.hidden[0][:1])
    problems = []
    for group, stats in zip(groups, collect_statistics(block, groups, Clock(), magnitudes=True), strict=True):
        W = torch.cat([linear_of(block.module, name).weight for name in group.linears])
        problems.append(Problem(W, stats, Grid(3, 32, True), torch.float16, torch.ones(len(W), dtype=torch.bool)))
    return block, groups, problems


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "qwen2", "gemma2", "gemma3", "phi3", "olmo2", "granite"])
@torch.no_grad()
def test_the_folded_block_computes_the_same_function(name, tmp_path):
    block, groups, problems = first_block(save_tiny(tmp_path, name))
    before = {n: t.clone() for n, t in block.module.state_dict().items()}
    expected = block.run(block.hidden[0])
    changed, notes = awq.transform(block, groups, problems, Awq())
    assert notes == []
    after = block.module.state_dict()
    linears = {f"{linear}.weight" for group in groups for linear in group.linears}
    assert {n for n in after if not torch.equal(after[n], before[n])} - linears <= changed
    assert any(not torch.equal(after[n], before[n]) for n in linears), "nothing was folded"
    assert (block.run(block.hidden[0]) - expected).norm() / expected.norm() < 1e-5


@torch.no_grad()
def test_after_folding_each_problem_describes_the_scaled_block(tmp_path):
    block, groups, problems = first_block(save_tiny(tmp_path, "llama-mha"))
    awq.transform(block, groups, problems, Awq())
    for group, problem, measured in zip(
        groups, problems, collect_statistics(block, groups, Clock(), magnitudes=True), strict=True
    ):
        assert torch.equal(problem.W, torch.cat([linear_of(block.module, name).weight for name in group.linears]))
        assert torch.allclose(problem.statistics.H, measured.H, rtol=1e-3, atol=1e-4 * float(measured.H.max()))


@torch.no_grad()
def test_a_fold_that_changes_the_function_is_undone_alone_and_reported(tmp_path, monkeypatch):
    block, groups, problems = first_block(save_tiny(tmp_path, "llama-gqa"))
    before = {n: t.clone() for n, t in block.module.state_dict().items()}
    expected = block.run(block.hidden[0])
    honest = awq._fold

    def forgetful(module, group, s, storage):
        s = honest(module, group, s, storage)
        if group.producer == "input_layernorm":
            module.input_layernorm.weight.data *= 1.01
        return s

    monkeypatch.setattr(awq, "_fold", forgetful)
    changed, notes = awq.transform(block, groups, problems, Awq())
    assert len(notes) == 1
    assert "fold into input_layernorm undone" in notes[0]
    assert "input_layernorm.weight" not in changed
    assert "post_attention_layernorm.weight" in changed
    for name in ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.v_proj.weight"):
        assert torch.equal(block.module.state_dict()[name], before[name])
    assert not torch.equal(block.module.state_dict()["mlp.gate_proj.weight"], before["mlp.gate_proj.weight"])
    assert (block.run(block.hidden[0]) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_rounding_a_norm_to_half_precision_is_compensated_by_the_linears(tmp_path, dtype):
    block, groups, problems = first_block(save_tiny(tmp_path, "llama-gqa", dtype))
    for problem in problems:
        problem.scale_dtype = dtype
    expected = block.run(block.hidden[0])
    awq.transform(block, groups, problems, Awq())
    for norm in (block.module.input_layernorm, block.module.post_attention_layernorm):
        assert torch.equal(norm.weight, norm.weight.to(dtype).float())
    assert (block.run(block.hidden[0]) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_fold_through_an_activation_is_undone_in_any_precision(tmp_path, dtype, monkeypatch):
    source = save_tiny(tmp_path, "arcee", torch.bfloat16)
    monkeypatch.setattr(block_structure, "_DECLARED_FOLDS", (("up_proj", "down_proj", "up_proj"),))
    block, groups, problems = first_block(source, dtype)
    assert groups[-1].producer == "mlp.up_proj"
    _, notes = awq.transform(block, groups, problems, Awq())
    (note,) = notes
    assert "fold into mlp.up_proj undone" in note


@pytest.mark.parametrize("name", ["llama-mha", "gemma2", "phi3"])
@torch.no_grad()
def test_sound_folds_pass_in_bfloat16(name, tmp_path):
    block, groups, problems = first_block(save_tiny(tmp_path, name, torch.bfloat16), torch.bfloat16)
    changed, notes = awq.transform(block, groups, problems, Awq())
    assert notes == []
    assert changed


@torch.no_grad()
def test_after_folding_the_original_model_is_still_the_target(tmp_path):
    """Nothing is quantized yet, so what this model lacks is nothing: T = X_o W_oᵀ - X Wᵀ = 0."""
    block, groups, problems = first_block(save_tiny(tmp_path, "llama-mha"))
    block.original = [hidden.clone() for hidden in block.hidden]
    block.keep_original()
    awq.transform(block, groups, problems, Awq())
    for statistics in collect_statistics(block, groups, Clock(), last=False, magnitudes=True):
        assert statistics.target_moment is not None
        assert statistics.target_moment.abs().max() < 1e-4 * statistics.H.abs().max()
