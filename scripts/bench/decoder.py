"""Time decode steps of a whole LLaMA with random weights, packed and in 16 bit.

Both models use the same code: the layers of transformers, with q, k, v merged and gate, up merged, and a static cache.
They compute the same function, except for rounding. A step is timed in three ways: as one CUDA graph; as one CUDA graph
of code from torch.compile, which fuses the work between the matmuls; and without a graph, where Python launches each
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from llmq_kernels import PackedWeight, choose, dequantize, new_counters, pack, packed_linear
from llmq_kernels.choose import Problem, tables_for, tile_for
from llmq_kernels.trial import random_codes
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from bench import models
from bench.machine import time_plainly, timed
from bench.plan import Decoder, Plan
from bench.session import Session, Task

_SAME = 0.1
"""Largest relative difference between the logits of the two models, after one step through all layers in 16 bit."""


class Packed(nn.Module):
    """Multiplies by a packed weight, x Wᵀ, as llmq.runtime.packed_linear.PackedLinear does."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        (words,) = weight.words
        self.register_buffer("words", words)
        self.register_buffer("grid", weight.grid)
        self.register_buffer("counters", new_counters(weight.device))
        self.words: Tensor
        self.grid: Tensor
        self.counters: Tensor
        self.scheme = weight.bits, weight.group_size, weight.in_features, weight.symmetric

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, PackedWeight((self.words,), self.grid, *self.scheme), None, self.counters)


class Dense(nn.Module):
    """Multiplies by the same weight in 16 bit, x Wᵀ."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", dequantize(weight, dtype))
        self.weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Attention(nn.Module):
    """Attention of one new token to a static cache. One product computes q, k and v."""

    def __init__(self, qkv: nn.Module, o: nn.Module, sizes: Decoder, like: Tensor) -> None:
        super().__init__()
        self.qkv, self.o, self.heads = qkv, o, sizes.heads
        shape = (1, sizes.heads, sizes.context, sizes.hidden // sizes.heads)
        self.register_buffer("keys", like.new_zeros(shape))
        self.register_buffer("values", like.new_zeros(shape))
        self.keys: Tensor
        self.values: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor,
        **_: Any,
    ) -> tuple[Tensor, None]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k, v = (third.transpose(1, 2) for third in self.qkv(hidden_states).view(1, 1, 3, self.heads, -1).unbind(2))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        self.keys.index_copy_(2, position_ids[0], k)
        self.values.index_copy_(2, position_ids[0], v)
        y = scaled_dot_product_attention(q, self.keys, self.values, attn_mask=attention_mask)
        return self.o(y.transpose(1, 2).reshape(1, 1, -1)), None


class Mlp(nn.Module):
    """The MLP of a LLaMA block: down(SiLU(gate) * up). One product computes gate and up."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Step:
    """One decode step of one sequence. It replaces token and position by the next ones, in the same memory."""

    def __init__(self, model: Any, sizes: Decoder, where: torch.device) -> None:
        self.model, self.context = model, sizes.context
        self.token = torch.zeros(1, 1, dtype=torch.long, device=where)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=where)
        self._positions = torch.arange(sizes.context, device=where)

    def __call__(self) -> Tensor:
        decoder = self.model.model
        hidden = decoder.embed_tokens(self.token)
        rotary = decoder.rotary_emb(hidden, self.position)
        seen = (self._positions <= self.position)[None, None]
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=seen, position_ids=self.position, position_embeddings=rotary)
        logits = self.model.lm_head(decoder.norm(hidden))
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.copy_((self.position + 1) % self.context)
        return logits


HOW = ("eager", "compiled", "ungraphed")


def tasks(session: Session, how_to: Sequence[str]) -> Iterator[Task]:
    """Yield the tasks: packed and 16 bit, each in a graph, compiled in a graph, or without a graph."""
    for how in how_to:
        for kind in ("packed", "dense"):
            work = partial(_decode, session, kind, how)
            seconds = 75 if how == "compiled" else 25
            yield Task("decode", (kind, how, session.plan.dtype), work, seconds=seconds)
    yield Task("decode", None, lambda: session.cache.pop("models", None), seconds=0)


@torch.no_grad()
def _decode(session: Session, kind: str, how: str) -> dict[str, Any]:
    machine, sizes = session.machine, session.plan.decoder
    if how == "ungraphed":
        machine = replace(machine, timer=time_plainly)
    tables = ({"rows": session.results.of("tune")}, *tables_for(machine.device.name, machine.device.arch))
    tile_for.cache_clear()
    with mock.patch.object(choose, "tables_for", return_value=tables):  # tiles that this benchmark has tuned
        model, apart = _models(session)[kind], session.cache["models apart"]
        if not apart <= _SAME:
            raise RuntimeError(f"the packed model and its 16-bit copy differ by {apart:.2g} in their logits")
        for layer in model.model.layers:
            layer._compiled_call_impl = None
            if how == "compiled":
                layer.compile(backend=machine.compiler, dynamic=False)
        step = Step(model, sizes, machine.where)
        for _ in range(3):
            step()
        timing = timed(machine, [step], 1e-3, sizes.replays)
        if not bool(torch.isfinite(step()).all()):
            raise RuntimeError("the logits are not finite")
    read = [tensor for name, tensor in model.named_buffers() if name.endswith(("words", "grid", "weight"))]
    total = sum(tensor.nbytes for tensor in (*read, model.lm_head.weight))
    return timing | {"tokens_per_second": 1e6 / timing["us"], "bytes": total, "models_apart": apart}


def _models(session: Session) -> dict[str, Any]:
    if "models" not in session.cache:
        weights = [_weights(session, i) for i in range(session.plan.decoder.layers)]
        dtype = getattr(torch, session.plan.dtype)
        both = {
            "packed": _model(session, weights, Packed),
            "dense": _model(session, weights, lambda weight: Dense(weight, dtype)),
        }
        session.cache["models"] = both
        first, second = (Step(model, session.plan.decoder, session.machine.where)().float() for model in both.values())
        session.cache["models apart"] = float((first - second).norm() / second.norm())
    return session.cache["models"]


def problems(plan: Plan) -> dict[str, Problem]:
    """Return the matmuls of one layer in a decode step, by name."""
    hidden, intermediate = plan.decoder.hidden, plan.decoder.intermediate
    shapes = {"qkv": (3 * hidden, hidden), "o": (hidden, hidden)}
    shapes |= {"gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}
    return {name: Problem(4, plan.group, True, plan.dtype, 1, N, K) for name, (N, K) in shapes.items()}


def _weights(session: Session, layer: int) -> dict[str, PackedWeight]:
    where, packed = session.machine.where, {}
    for i, (name, problem) in enumerate(problems(session.plan).items()):
        packed[name] = pack(*random_codes(problem, where, seed=4 * layer + i), problem.bits)
    return packed


def _model(
    session: Session, weights: list[dict[str, PackedWeight]], layer_of: Callable[[PackedWeight], nn.Module]
) -> Any:
    """Return a LLaMA of transformers, with its attentions and MLPs replaced by ours."""
    from transformers import LlamaForCausalLM

    sizes, where = session.plan.decoder, session.machine.where
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(models.config_of(sizes)).to(getattr(torch, session.plan.dtype))
    for layer in model.model.layers:
        layer.self_attn = layer.mlp = nn.Identity()
    models.filled(model, where)
    for layer, packed in zip(model.model.layers, weights, strict=True):
        linears = {name: layer_of(weight) for name, weight in packed.items()}
        layer.self_attn = Attention(linears["qkv"], linears["o"], sizes, model.lm_head.weight)
        layer.mlp = Mlp(linears["gate_up"], linears["down"])
    return model
