"""The layer-by-layer loop: every block sees the hidden states it will see in the quantized model.

    tokens ──► embeddings ──► hidden states ──► block 0 ──► block 1 ──► …        one block's weights in memory at a time
                                     │             │
                              recorded once    yielded to be quantized, then run again to give block 1 its inputs

(Frantar et al. 2022, arXiv 2210.17323, section 4.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from llmq.block import Block, Compute
from llmq.clock import Clock
from llmq.data import Tokens
from llmq.errors import RequestError
from llmq.memory import release_memory
from llmq.source import ModelSource, move_buffers

# Enough to keep matmuls busy: what a run needs beside its results stays in the caches (SmolLM2-135M on 2 cores with
# AVX-512: 4 blocks in 28.7 s; 29.9 s with twice, 31.4 s with four times as many; 2026-11-23).
_TOKENS_PER_RUN = 1024


def stream(
    source: ModelSource, tokens: Tokens, compute: Compute, clock: Clock, keep_original: bool = False
) -> Iterator[Block]:
    """Yield each block in order. What the caller leaves in its weights decides what the next block sees.

    Args:
        tokens: calibration sequences; they may be few and short for methods that need no statistics.
        keep_original: blocks come with the original model's hidden states too, if there are held-out samples to tell
            by how far to follow them.
    """
    with clock("forward"):
        hidden, arguments = record_block_inputs(source, tokens, compute)
    held_out_from = len(_micro_batches(tokens.train))
    original = list(hidden) if keep_original and held_out_from < len(hidden) else None
    for name, block_arguments in zip(source.block_names, arguments, strict=True):
        names = source.block_tensor_names(name)
        with clock("read"):
            source.load(names, compute.device, compute.dtype)
        module = source.skeleton.get_submodule(name)
        block = Block(name, module, hidden, held_out_from, block_arguments, compute, original)
        yield block
        if name != source.block_names[-1]:
            with clock("forward"), block.many_runs():
                for i in range(len(hidden)):
                    hidden[i] = block.run_batch(i).cpu()
        source.free(names)
        block.forget()
        release_memory()


@torch.no_grad()
def record_block_inputs(
    source: ModelSource, tokens: Tokens, compute: Compute
) -> tuple[list[Tensor], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Hidden states entering the first block, and the other arguments of every block.

    All blocks are recorders that pass their input on, so one cheap forward through embeddings and masks shows what the
    model gives to each of them (Gemma-style models give different masks), and no exception has to stop it.
    Arguments are recorded for one sequence and broadcast over a micro-batch.
    """
    decoder = source.skeleton.get_decoder()
    inside = {id(tensor) for tensor in decoder.state_dict(keep_vars=True).values()}
    outer = source.skeleton.state_dict(keep_vars=True)
    names = [name for name in source.outer_names() if id(outer[name]) in inside]
    source.load(names, compute.device, compute.dtype)
    move_buffers(source.skeleton, compute.device)
    with _recorders(source.blocks) as calls:

        def recorded(ids: Tensor) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
            calls.clear()
            decoder(input_ids=ids.to(compute.device), use_cache=False)
            return list(calls)

        one, other = recorded(tokens.train[:1]), recorded(tokens.train[:1].flip(1))
        arguments = [(args, kwargs) for _, args, kwargs in one]
        if not _same(*([(args, list(kwargs.items())) for _, args, kwargs in each] for each in (one, other))):
            name = type(decoder).__name__
            raise RequestError(f"the blocks of {name} take arguments that depend on the tokens; llmq cannot stream it")
        batches = _micro_batches(tokens.train) + _micro_batches(tokens.held_out)
        hidden = [recorded(batch)[0][0].cpu() for batch in batches]
    source.free(names)
    if len(arguments) != len(source.blocks) or calls[-1][0].shape != calls[0][0].shape:
        raise RequestError(
            f"{type(decoder).__name__} does not run its blocks one after the other; llmq cannot stream it"
        )
    return hidden, arguments


@contextmanager
def _recorders(blocks: list[nn.Module]) -> Iterator[list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]]:
    """Make every block an identity that notes its arguments. Only `forward` is replaced: attributes stay readable."""
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden, args[1:], kwargs))
        return hidden

    for block in blocks:
        block.forward = record
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


def _same(a: Any, b: Any) -> bool:
    """Whether two recordings agree. An empty dictionary is a state that blocks will share: never the same."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return bool(a) and isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or bool(a == b)


def _micro_batches(tokens: Int64[Tensor, "samples length"]) -> list[Tensor]:
    return list(tokens.split(max(1, _TOKENS_PER_RUN // tokens.shape[1]))) if len(tokens) else []
