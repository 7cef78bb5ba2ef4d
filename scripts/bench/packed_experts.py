"""Time a layer of experts from packed words, beside transformers' grouped matmul on the same weights in 16 bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from llmq_kernels import ExpertWeights, dequantize, new_counters, pack, reference, stack_experts
from llmq_kernels.choose import Problem
from llmq_kernels.experts_op import rule_for_experts
from llmq_kernels.packed_experts import packed_experts
from llmq_kernels.trial import random_codes, random_tokens
from torch import Tensor
from torch.nn.functional import silu

from bench.bars import TWO_ROUNDINGS
from bench.machine import timed
from bench.session import Session, Task

PACKED, GROUPED = "packed", "grouped"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, hidden], experts [T, k], scores [T, k] -> [T, hidden]"""
_ROUNDINGS = 3  # of a layer, to those of a matmul: inputs of the second one and the sum over the choices are rounded


class Experts(NamedTuple):
    gate_up: ExpertWeights
    down: ExpertWeights


def tasks(session: Session) -> Iterator[Task]:
    """Yield a task for each number of tokens and each path."""
    for tokens in session.plan.experts.tokens:
        for path in (PACKED, GROUPED):
            yield Task("experts", (path, tokens), partial(_time, session, path, tokens), path == PACKED, seconds=6)


def _time(session: Session, path: str, tokens: int) -> dict[str, Any]:
    machine, sizes = session.machine, session.plan.experts
    x = random_tokens(_problem(session, sizes.hidden, sizes.hidden, tokens), machine.where)
    routings = [_routing(session, tokens, draw) for draw in range(sizes.draws)]
    layer = _layer(session, path)
    y, exact = layer(x, *routings[0]), _exact(session)(x.double(), *routings[0])
    error, bar = float((y.double() - exact).norm() / exact.norm()), _ROUNDINGS * TWO_ROUNDINGS[session.plan.dtype]
    if not error <= bar:  # the time of a wrong result is not kept
        raise RuntimeError(f"wrong result: error {error:.2e} is above the bar {bar:.1e}")
    launches = [partial(layer, x, *routing) for routing in routings]
    hit = sum(len(index.unique()) for index, _ in routings) / len(routings)
    weights = 3 * hit * sizes.hidden * sizes.intermediate
    row = {"path": path, "tokens": tokens, "hit": round(hit, 1), "error": error}
    return row | timed(machine, launches, weights / 2 / 5e12, session.plan.replays)


def _routing(session: Session, tokens: int, draw: int) -> tuple[Tensor, Tensor]:
    """Return (experts, scores) of a draw. A single token's are others in each of E / k draws: none are in the cache."""
    sizes, generator = session.plan.experts, torch.Generator().manual_seed(draw)
    if tokens == 1:
        order = torch.randperm(sizes.experts, generator=torch.Generator().manual_seed(0))
        index = order.roll(-sizes.top * draw)[None, : sizes.top]
    else:
        index = torch.rand(tokens, sizes.experts, generator=generator).topk(sizes.top).indices
    scores = torch.rand(tokens, sizes.top, generator=generator).softmax(1)
    return index.to(session.machine.where), scores.to(session.machine.where)


def _problem(session: Session, N: int, K: int, M: int = 1) -> Problem:
    return Problem(4, session.plan.group, True, session.plan.dtype, M, N, K)


def _experts(session: Session) -> Experts:
    """Return random weights. They are kept: making them takes seconds."""
    if "experts" not in session.cache:
        sizes, where = session.plan.experts, session.machine.where
        shapes = (2 * sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)
        stacks = []
        for problem in (_problem(session, *shape) for shape in shapes):
            stacks.append(
                stack_experts([pack(*random_codes(problem, where, e), problem.bits) for e in range(sizes.experts)])
            )
        session.cache["experts"] = Experts(*stacks)
    return session.cache["experts"]


def _layer(session: Session, path: str) -> Layer:
    if ("experts", path) not in session.cache:
        session.cache["experts", path] = {PACKED: _packed, GROUPED: _grouped}[path](session)
    return session.cache["experts", path]


def _packed(session: Session) -> Layer:
    experts, counters, device = _experts(session), new_counters(session.machine.where), session.machine.device

    def multiply(x: Tensor, weights: ExpertWeights, index: Tensor, scores: Tensor | None) -> Tensor:
        problem = _problem(session, weights.out_features, weights.in_features, len(index))
        tile = rule_for_experts(device, problem, len(weights), index.shape[1])
        return packed_experts(x, weights, index, None, scores, counters, tile)

    def layer(x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        gate, up = multiply(x, experts.gate_up, index, None).flatten(0, 1).chunk(2, dim=1)
        return multiply(silu(gate) * up, experts.down, index, scores).sum(1)

    return layer


def _exact(session: Session) -> Layer:
    experts = _experts(session)

    def layer(x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        gate, up = reference.routed_matmul(x, experts.gate_up, index).flatten(0, 1).chunk(2, dim=1)
        return reference.routed_matmul(silu(gate) * up, experts.down, index, None, scores).sum(1)

    return layer


def _grouped(session: Session) -> Layer:
    """Return transformers' own layer, with the implementation that it chooses by default."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes, dtype = session.plan.experts, getattr(torch, session.plan.dtype)
    config = Qwen3MoeConfig(
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top,
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.intermediate,
        experts_implementation="grouped_mm",  # pyright: ignore[reportCallIssue]
    )
    with torch.device("meta"):
        layer = Qwen3MoeExperts(config)
    for name, weights in zip(("gate_up_proj", "down_proj"), _experts(session), strict=True):
        dense = torch.stack([dequantize(weights.expert(e), dtype) for e in range(len(weights))])
        setattr(layer, name, torch.nn.Parameter(dense, requires_grad=False))
    return layer
