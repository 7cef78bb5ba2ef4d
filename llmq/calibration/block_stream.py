"""The layer-by-layer loop: every block sees the hidden states it will see in the quantized model.

    tokens ──► embeddings ──► hidden states ──► block 0 ──► block 1 ──► …        one block's weights in memory at a time
                                     │             │
                              recorded once    yielded to be quantized, then run again to give block 1 its inputs

(Frantar et al. 2022, arXiv 2210.17323, section 4.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.hidden_states import HiddenDir, HiddenStates, StoredStates
from llmq.calibration.texts import Tokens
from llmq.calibration.work_split import portion_of
from llmq.core.distributed import ALONE, Ranks
from llmq.core.errors import RequestError
from llmq.core.memory import release_memory
from llmq.core.timing import Clock
from llmq.models.model_source import ModelSource, move_buffers

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given beside hidden states."""


@dataclass(frozen=True)
class Journey:
    """How the hidden states travel through the model, and where they set out."""

    keep_original: bool = False
    """Blocks come with the original model's hidden states too, if there are held-out samples to tell by how far to
    follow them."""
    ranks: Ranks = ALONE
    stop: int | None = None
    """Index of the block after the last one that is wanted."""
    linears: torch.dtype | None = None
    """In which the weights of linears are loaded, if not in the one of computation."""
    states_unused: bool = False
    """Nobody looks at the hidden states: they stay what they are."""
    finished: int = 0
    """Blocks that an earlier run has finished: they are not yielded."""
    restore: Callable[[Block], None] = lambda _: None
    """Gives such a block the weights it was left with."""
    passed: Callable[[], None] = lambda: None
    """Called when the hidden states have passed a block: nothing more is done with it."""
    hidden_dir: HiddenDir | None = None
    """Where hidden states wait on disk, perhaps with the inputs of the first block that is not finished; None for
    memory."""

    @property
    def is_under_way(self) -> bool:
        """The inputs of the first block that is not finished wait on disk."""
        return self.hidden_dir is not None and self.hidden_dir.turn is not None


def stream(
    source: ModelSource, tokens: Tokens, compute: Compute, clock: Clock, journey: Journey | None = None
) -> Generator[Block]:
    """Yield each block in order. What the caller leaves in its weights decides what the next block sees.

    Args:
        tokens: calibration sequences; they may be few and short for methods that need no statistics.
    """
    journey = journey or Journey()
    travellers, names = _Travellers(source, tokens, compute, clock, journey), source.block_names[: journey.stop]
    try:
        for index, name in enumerate(names):
            if index < journey.finished and (journey.states_unused or journey.is_under_way):
                continue
            block = travellers.enter(index, name)
            if index >= journey.finished:
                yield block
            else:
                with clock("forward"):
                    travellers.original_passes(block)
                journey.restore(block)
            if not journey.states_unused and name != names[-1]:
                with clock("forward"), block.many_runs():
                    for i in range(len(block.hidden)):
                        block.hidden[i] = block.run_batch(i).cpu()
            journey.passed()
            source.free(source.block_tensor_names(name))
            block.forget()
            release_memory()
    finally:
        travellers.close()


class _Travellers:
    """The hidden states of this process, and what each block is to know of them."""

    def __init__(self, source: ModelSource, tokens: Tokens, compute: Compute, clock: Clock, journey: Journey) -> None:
        self.source, self.compute, self.clock, self.journey = source, compute, clock, journey
        self.portion = portion_of(tokens, journey.ranks)
        self.shapes = [
            torch.Size((*batch.shape, source.config.get_text_config().hidden_size)) for batch in self.portion.batches
        ]
        self.hidden = self._waiting("quantized")
        self.original = self._waiting("original") if journey.keep_original and len(tokens.held_out) > 0 else None
        with clock("forward"):
            batches = [] if journey.is_under_way else self.portion.batches
            sample, self.arguments = record_block_inputs(source, tokens.train[:1], compute, batches, self._set_out)
            self.sample = journey.ranks.share(sample).cpu()

    def _waiting(self, kind: str) -> HiddenStates:
        """Where they wait."""
        if self.journey.hidden_dir is None:
            return [torch.empty(0)] * len(self.shapes)
        return StoredStates(self.journey.hidden_dir, kind, self.shapes, self.compute.dtype)

    def _set_out(self, i: int, hidden: Tensor) -> None:
        self.hidden[i] = hidden
        if self.original is not None:
            self.original[i] = hidden

    def enter(self, index: int, name: str) -> Block:
        """The block with its weights loaded."""
        compute = self.compute
        with self.clock("read"):
            module = load_block(self.source, name, compute, self.journey.linears)
        arguments, ranks, portion = self.arguments[index], self.journey.ranks, self.portion
        states = (self.hidden, portion.held_out_from, arguments, compute, self.original, ranks)
        return Block(name, module, *states, portion.shares, self.sample)

    def original_passes(self, block: Block) -> None:
        """The original model's hidden states go through a block whose weights are still its own."""
        if block.original is None:
            return
        with block.many_runs():
            for i in range(len(block.original)):
                block.original[i] = block.run_batch(i, original=True).cpu()

    def close(self) -> None:
        for states in (self.hidden, self.original):
            if isinstance(states, StoredStates):
                states.close()


def load_block(source: ModelSource, name: str, compute: Compute, linears: torch.dtype | None) -> nn.Module:
    """The block of this name with its weights. `linears`: dtype of those of its linears, if not that of `compute`."""
    module, names = source.skeleton.get_submodule(name), source.block_tensor_names(name)
    apart = {f"{name}.{inner}.weight" for inner, m in module.named_modules() if isinstance(m, nn.Linear)}
    source.load([each for each in names if each in apart], compute.device, linears or compute.dtype)
    source.load([each for each in names if each not in apart], compute.device, compute.dtype)
    return module


@torch.no_grad()
def record_block_inputs(
    source: ModelSource,
    one: Int64[Tensor, "1 length"],
    compute: Compute,
    batches: Sequence[Tensor] = (),
    keep: Callable[[int, Tensor], None] = lambda *_: None,
) -> tuple[Float[Tensor, "1 length features"], list[Arguments]]:
    """Hidden states entering the first block, and the other arguments of every block.

    All blocks are recorders that pass their input on, so one cheap forward through embeddings and masks shows what the
    model gives to each of them (Gemma-style models give different masks), and no exception has to stop it.
    Arguments are recorded for one sequence and broadcast over a micro-batch.

    Args:
        one: a sequence.
        keep: is given the hidden states of each of the batches, on the CPU.

    Returns:
        the hidden states of the one sequence, on the device; the arguments of each block.
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

        first, other = recorded(one), recorded(one.flip(1))
        arguments = [(args, kwargs) for _, args, kwargs in first]
        if not _same(*([(args, list(kwargs.items())) for _, args, kwargs in each] for each in (first, other))):
            name = type(decoder).__name__
            raise RequestError(f"the blocks of {name} take arguments that depend on the tokens; llmq cannot stream it")
        for i, batch in enumerate(batches):
            keep(i, recorded(batch)[0][0].cpu())
    source.free(names)
    if len(arguments) != len(source.blocks) or calls[-1][0].shape != calls[0][0].shape:
        raise RequestError(
            f"{type(decoder).__name__} does not run its blocks one after the other; llmq cannot stream it"
        )
    return first[0][0], arguments


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
