"""Learned rounding: train the codes and scales of a block, so that it computes what the original block computed.

Objective, over the codes and scales of all linears of a block at once, with the block's inputs X in the quantized model
and X_o in the original one:

    mean over tokens of  |E|² / (|Y|² + |E|²),     Y = B_original(X_o),   E = B_quantized(X) - Y,   denominators fixed,
    Ŵ = s · (q - z),   q = round(V) within the codes

q and s are trained by gradients that ignore the rounding (straight through). This is EfficientQAT's Block-AP (Chen et
al., arXiv 2407.11062) and close to AutoRound (Cheng et al., arXiv 2309.05516). What deviates from both, and why:

  * Training starts from a GPTQ solution, and V starts at the weight's position within its cell, so few steps suffice.
  * V is measured in codes, so one learning rate suits every layer, however large its weights are.
  * A token's error is divided by the size of its own output, as the norm after the last block does, and counts 1 at
    most. In a plain sum, 95 % came from the first tokens of the sequences (SmolLM2-135M, block 12, 2 bit, 2026-11-23).
  * The target is the original model's output on its own inputs, as in output_matching.py. The inputs X of the quantized
    model already contain errors.
  * The state with the least error on held-out tokens is kept. The start is one of them: never worse than GPTQ there.

Memory: one block, its gradients and the two moments of Adam.
"""

from dataclasses import replace

import torch
from torch import Tensor

from llmq.algorithms.problem import Problem, Solution
from llmq.calibration.block_runner import Block
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import Tuned
from llmq.models.block_structure import Group, linear_of
from llmq.training.learnable_weight import Latent
from llmq.training.loop import Task, train


def refine(
    block: Block, groups: list[Group], problems: list[Problem], solutions: list[Solution], settings: Tuned
) -> tuple[list[Solution], tuple[float, float]]:
    """Return better solutions, and the held-out loss before and after. The targets are in `block.original`."""
    latents = [latent_of(problem, solution) for problem, solution in zip(problems, solutions, strict=True)]
    held_out = list(range(block.held_out_from, len(block.hidden)))

    def loss(batch: list[int]) -> Tensor:
        return _error(block, groups, [latent() for latent in latents], batch)

    def held_out_loss() -> float:
        return sum(float(loss([i])) for i in held_out) / len(held_out)

    def state() -> list[Solution]:
        weights = (latent.rounded() for latent in latents)
        return [
            replace(old, q=new.q, scale=new.scale, zero=new.zero) for old, new in zip(solutions, weights, strict=True)
        ]

    codes: list[Tensor] = [latent.V for latent in latents]
    scales: list[Tensor] = [each for latent in latents for each in latent.grids]
    parameters = [(codes, settings.rate), (scales, settings.scale_rate)]
    task = Task(parameters, block.held_out_from, loss, held_out_loss, state)
    return train(task, settings.steps, settings.batch, solutions)


def latent_of(problem: Problem, solution: Solution) -> Latent:
    """Return the trainable weight of a group of linears."""
    return Latent(QuantizedWeight(solution.q, solution.scale, solution.zero, problem.grid.bits), problem.W)


def _error(block: Block, groups: list[Group], weights: list[Tensor], batch: list[int]) -> Tensor:
    """Return the objective on these micro-batches."""
    assert block.original is not None, "learned rounding needs the original model's outputs"
    named: dict[str, Tensor] = {}
    for group, W in zip(groups, weights, strict=True):
        rows = [linear_of(block.module, name).out_features for name in group.linears]
        of_linears = zip(group.linears, torch.split(W, rows), strict=True)
        named |= {f"{name}.weight": weight.to(block.compute.dtype) for name, weight in of_linears}
    wanted = torch.cat([block.original[i] for i in batch], block.batch_dim).to(block.compute.device).float()
    output = block.run_together(named, batch)
    E = (output.float() - wanted).square().sum(-1)
    # No gradient flows through the denominator: it would make training give up tokens with a large error.
    return (E / (wanted.square().sum(-1) + E.detach()).clamp(min=torch.finfo(E.dtype).tiny)).mean()
