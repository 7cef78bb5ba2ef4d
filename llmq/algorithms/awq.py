"""AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (Lin et al., arXiv 2306.00978).

Weights of channels with large activations should lose less. So a weight column is scaled by s before rounding, and its
activation channel by 1/s. The layer computes the same, but the rounding is finer where it matters:

    L(s) = || Q(W · s) · (s⁻¹ · X) - W X ||²,    s = mean|x|^ratio,  the best of 20 ratios in [0, 1)

The 1/s is folded into the module that produces the activations (a norm, v_proj's rows, up_proj's rows), so it costs
nothing at run time. Afterwards every group's range is clipped where that lowers the error.

What deviates from the paper, and why:
  * L is computed as tr(ΔW H ΔWᵀ) with ΔW = Q(W·s)/s - W and H = XᵀX, for all linears of this input. It is the
    layers' exact output error. It costs far less than a run of the block for every ratio.
  * Clipping is scored for each row, with the group's own diagonal block of H.
  * A norm's new weight is rounded to its storage dtype first. Then the linears are scaled by the ratio of the old
    weight to the rounded one, so the fold costs no precision.
  * v_proj -> o_proj is skipped under grouped-query attention, where one channel of v feeds several of o.
  * After each fold the block must compute the same as before. Otherwise the fold is undone and reported.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.algorithms.problem import Problem, Solution, nearest_points, round_to_nearest
from llmq.algorithms.stable_sums import energy
from llmq.calibration.block_runner import Block
from llmq.core import grid
from llmq.core.settings import Awq
from llmq.models.block_structure import Group, linear_of

ROWS_PER_SEARCH = 4096  # rows searched at once, to bound memory on wide layers; rows do not interact
# Largest drift by the dtype of the weights, relative to the block's own output, which is computed in float32. Sound
# folds of eight tiny models measure 6e-7, 7e-4 and 5e-3 at most, one through an activation 1.6e-1 (2026-11-28).
_SAME_FUNCTION = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def transform(block: Block, groups: list[Group], problems: list[Problem], settings: Awq) -> tuple[set[str], list[str]]:
    """Scale the block's linears, fold the inverse into their producers, and update the problems, all in place.

    Return the names of the other tensors of the block that changed, and fallbacks.
    """
    sample = block.sample
    assert sample is not None
    expected = block.run_exact(sample)
    changed: set[str] = set()
    notes: list[str] = []
    for group, problem in zip(groups, problems, strict=True):
        if group.producer is None or problem.statistics is None:
            continue
        touched = [block.module.get_submodule(name) for name in (group.producer, *group.linears)]
        before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in touched]
        s = _fold(block.module, group, search_scales(problem, settings.ratios), problem.scale_dtype)
        drift = _drift(block, sample, expected)
        if not drift <= _SAME_FUNCTION[block.compute.dtype]:
            for module, state in zip(touched, before, strict=True):
                module.load_state_dict(state)
            notes.append(f"AWQ fold into {group.producer} undone: the block's function changed by {drift:.1e}")
            continue
        changed |= {f"{group.producer}.weight", f"{group.producer}.bias"}
        block.folds[group.linears[0]] = s
        stats = problem.statistics
        H, H_val = (moments / torch.outer(s, s) for moments in (stats.H, stats.H_val))
        problem.statistics = replace(stats, H=H, H_val=H_val, mean_abs=None)
    for group, problem in zip(groups, problems, strict=True):
        # After all folds, because a fold may change the rows of another group (v_proj, up_proj).
        problem.W = torch.cat([linear_of(block.module, name).weight.float() for name in group.linears])
    return changed, notes


def _drift(block: Block, sample: Tensor, expected: Tensor) -> float:
    """Return the relative change of the block's contribution to the residual stream, averaged over tokens."""
    change = (block.run_exact(sample) - expected).norm(dim=-1)
    contribution = (expected - sample.to(expected)).norm(dim=-1)
    return float((change / contribution).mean())


def search_scales(problem: Problem, ratios: int) -> Float[Tensor, "in"]:
    """Return the s = mean|x|^ratio with the smallest output error. Ratio 0 is plain rounding to nearest."""
    assert problem.statistics is not None, "awq needs input statistics"
    assert problem.statistics.mean_abs is not None, "awq needs the magnitudes of inputs"
    x = problem.statistics.mean_abs.clamp(min=1e-4)
    best, best_error = torch.ones_like(x), float("inf")
    for i in range(ratios):
        s = x ** (i / ratios)
        s = s / (s.max() * s.min()).sqrt()
        error = sum(_scaled_error(problem, rows, s) for rows in problem.W.split(ROWS_PER_SEARCH))
        if error < best_error:
            best, best_error = s, error
    return best


def _scaled_error(problem: Problem, W: Tensor, s: Tensor) -> float:
    assert problem.statistics is not None
    W_hat = nearest_points(problem, grid.group_view(W * s, problem.grid.group_size)).flatten(-2) / s
    return float(energy(W - W_hat, problem.statistics.H))


def solve(problem: Problem, settings: Awq) -> Solution:
    """Return the weights rounded to nearest on the best clipped grids."""
    if settings.clip_steps == 0:
        return round_to_nearest(problem)
    strips = problem.groups().split(ROWS_PER_SEARCH)
    shrink = torch.cat([_best_clip(problem, rows, settings.clip_steps) for rows in strips])
    shrink[~problem.clippable] = 1.0
    return round_to_nearest(problem, shrink)


def _best_clip(problem: Problem, W: Float[Tensor, "out groups size"], tries: int) -> Float[Tensor, "out groups"]:
    """Return, per row and group, the fraction of its range, 1 to just above 0.5, of least loss under H."""
    assert problem.statistics is not None, "awq needs input statistics"
    size = problem.grid.group_size
    H_gg = torch.stack([H_g[:, i * size : (i + 1) * size] for i, H_g in enumerate(problem.statistics.H.split(size))])
    best = torch.ones(W.shape[:2], device=W.device)
    best_error = torch.full_like(best, torch.inf)
    for i in range(tries):
        shrink = 1 - i / (2 * tries)
        E = (W - nearest_points(problem, W, shrink)).transpose(0, 1)
        error = ((E @ H_gg) * E).sum(-1).T
        better = error < best_error
        best = torch.where(better, shrink, best)
        best_error = torch.where(better, error, best_error)
    return best


def _fold(module: nn.Module, group: Group, s: Tensor, storage: torch.dtype) -> Tensor:
    """Divide the producer's channels by s and multiply the linears' columns by it; return the s really applied.

    Norms and biases are not quantized later. They are rounded to their storage dtype here, so that the block computes
    with the values of the future checkpoint.
    """
    assert group.producer is not None
    producer: Any = module.get_submodule(group.producer)
    bias: Tensor | None = getattr(producer, "bias", None)
    if group.norm_offset is not None:
        s = _fold_into_norm(producer.weight, s, group.norm_offset, storage)
    else:
        rows = producer.weight.data[-len(s) :]
        rows.copy_(rows.float() / s[:, None])
    if bias is not None:
        bias.data[-len(s) :] = (bias.data[-len(s) :].float() / s).to(storage).to(bias.dtype)
    for name in group.linears:
        weight = linear_of(module, name).weight
        weight.data = (weight.data.float() * s).to(weight.dtype)
    return s


def _fold_into_norm(weight: Tensor, s: Tensor, offset: float, storage: torch.dtype) -> Tensor:
    """Divide a norm's weight by s and round it; return the s that was really applied, 1 for channels left alone."""
    old = weight.data.float() + offset
    stored = (old / s - offset).to(storage)
    new = stored.float() + offset
    usable = (new != 0) & (old != 0)
    weight.data = torch.where(usable, stored.to(weight.dtype), weight.data)
    return torch.where(usable, old / torch.where(usable, new, 1.0), torch.ones_like(s))
