"""Learned rounding: what a block computes, made right by training its codes and scales.

Objective, over the codes and scales of all linears of a block at once, with the block's inputs X in the quantized model
and X_o in the original one:

    mean over tokens of  |E|² / (|Y|² + |E|²),     Y = B_original(X_o),   E = B_quantized(X) - Y,   denominators fixed,
    Ŵ = s · (q - z),   q = round(V) within the codes

q and s are trained by gradients that pass through the rounding as if it were not there (straight through). This is
EfficientQAT's Block-AP (Chen et al., arXiv 2407.11062) and close to AutoRound (Cheng et al., arXiv 2309.05516). What
deviates from both, and why:

  * Training starts from a GPTQ solution, and V from where within its cell the weight was: a few dozen steps are enough.
  * V is measured in codes, so one learning rate suits every layer, and none needs to know the weights' size.
  * Errors count in relation to the token's own output, as the norm after the last block will see them, and at most once
    each: of a plain sum 95 % came from the first tokens of the sequences (SmolLM2-135M, block 12, 2 bit, 2026-11-23).
  * The target is the output on the original model's own inputs, as in match.py, not that of the original weights on
    inputs that are wrong already.
  * The state with the least error on held-out tokens is kept, the start among them: never worse than GPTQ there.

Memory: one block, its gradients and the two moments of Adam.
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llmq import grid
from llmq.algorithms.problem import Problem, Solution
from llmq.arch import Group, linear_of
from llmq.block import Block
from llmq.config import Tuned

_INSIDE = 0.45  # how far from its code a latent weight may start, so that the start rounds to the GPTQ solution
_CHECKS = 5  # looks at the held-out tokens, or a few more


class Latent:
    """What is learned of one group of linears: V [out, groups, size] in codes, and a factor on each scale."""

    def __init__(self, problem: Problem, solution: Solution) -> None:
        self.solution, self.bits, self.dtype = solution, problem.grid.bits, problem.scale_dtype
        size = problem.grid.group_size
        self.scale, self.zero = solution.scale[..., None].float(), solution.zero[..., None].float()
        q = grid.group_view(solution.q, size).float()
        inside = problem.groups() / self.scale + self.zero
        self.V = torch.maximum(torch.minimum(inside, q + _INSIDE), q - _INSIDE).requires_grad_()
        self.factor = torch.ones_like(self.scale).requires_grad_()

    def weights(self) -> Float[Tensor, "out in"]:
        """Ŵ, with gradients."""
        scale: Any = self.scale * self.factor
        codes: Any = _Round.apply(self.V, 2**self.bits - 1)
        return (scale * (codes - self.zero)).flatten(-2)

    @torch.no_grad()
    def rounded(self) -> Solution:
        """The codes and scales as they would be stored now."""
        q = self.V.round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)
        return replace(self.solution, q=q, scale=grid.storable((self.scale * self.factor)[..., 0], self.dtype))


class _Round(torch.autograd.Function):
    """Nearest code; the gradient passes where V is within half a step of the codes."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, highest: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward((V + 0.5) * (highest + 0.5 - V) > 0)
        return V.round().clamp_(0, highest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


def refine(
    block: Block, groups: list[Group], problems: list[Problem], solutions: list[Solution], settings: Tuned
) -> tuple[list[Solution], tuple[float, float]]:
    """Better codes and scales for a block whose original outputs are in `block.original`.

    Returns:
        the solutions, and the objective on held-out tokens before and after.
    """
    latents = [Latent(problem, solution) for problem, solution in zip(problems, solutions, strict=True)]
    codes = {"params": [latent.V for latent in latents], "lr": settings.rate}
    scales = {"params": [latent.factor for latent in latents], "lr": settings.scale_rate}
    optimizer = torch.optim.Adam([codes, scales], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    held_out = list(range(block.held_out_from, len(block.hidden)))

    def held_out_error(solutions: list[Solution]) -> float:
        sizes = [problem.grid.group_size for problem in problems]
        weights = [solution.dequantize(size) for solution, size in zip(solutions, sizes, strict=True)]
        return float(sum(_error(block, groups, weights, [i]) for i in held_out)) / len(held_out)

    before = held_out_error(solutions)
    best, best_error = solutions, before
    for step, batch in enumerate(_batches(block.held_out_from, settings)):
        with torch.enable_grad():
            loss = _error(block, groups, [latent.weights() for latent in latents], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, settings.steps // _CHECKS) == 0 or step + 1 == settings.steps:
            now = [latent.rounded() for latent in latents]
            error = held_out_error(now)
            if error < best_error:
                best, best_error = now, error
    return best, (before, best_error)


def _batches(count: int, settings: Tuned) -> Iterator[list[int]]:
    """Indices of `batch` training micro-batches for each step, shuffled anew whenever less than a batch is left."""
    order, waiting = torch.Generator().manual_seed(0), []
    for _ in range(settings.steps):
        if len(waiting) < settings.batch:
            waiting = torch.randperm(count, generator=order).tolist()
        yield waiting[: settings.batch]
        waiting = waiting[settings.batch :]


def _error(block: Block, groups: list[Group], weights: list[Tensor], batch: list[int]) -> Tensor:
    """The objective on these micro-batches."""
    assert block.original is not None, "learned rounding needs the original model's outputs"
    named: dict[str, Tensor] = {}
    for group, W in zip(groups, weights, strict=True):
        rows = [linear_of(block.module, name).out_features for name in group.linears]
        parts = zip(group.linears, W.split(rows), strict=True)
        named |= {f"{name}.weight": part.to(block.compute.dtype) for name, part in parts}
    wanted = torch.cat([block.original[i] for i in batch]).to(block.compute.device).float()
    output = block.run_with(named, torch.cat([block.hidden[i] for i in batch]))
    E = (output.float() - wanted).square().sum(-1)
    # Without a gradient through the denominator, which would let go of tokens that are lost.
    return (E / (wanted.square().sum(-1) + E.detach()).clamp(min=torch.finfo(E.dtype).tiny)).mean()
