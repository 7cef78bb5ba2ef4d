"""The layer-by-layer loop: every block sees the hidden states it will see in the quantized model.

    tokens ──► embeddings ──► hidden states ──► block 0 ──► block 1 ──► …        one block's weights in memory at a time
                                     │             │
                              recorded once    yielded to be quantized, then run again to give block 1 its inputs

(Frantar et al. 2022, arXiv 2210.17323, section 4.)
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llmq.calibration.block_runner import Block, Compute, PerSequence
from llmq.calibration.hidden_states import HiddenDir, HiddenStates, StoredStates
from llmq.calibration.texts import Tokens
from llmq.calibration.work_split import portion_of
from llmq.core.distributed import ALONE, Ranks
from llmq.core.errors import RequestError
from llmq.core.memory import release_memory
from llmq.core.timing import Clock
from llmq.models.model_source import ModelSource, move_buffers

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block besides hidden states
_Call = tuple[Tensor, Arguments]  # the hidden states that enter a block, and its other arguments


@dataclass(frozen=True)
class StreamSettings:
    """How hidden states pass through the model, and where they start."""

    keep_original: bool = False  # give blocks the original's hidden states too, if there are held-out samples
    ranks: Ranks = ALONE
    stop: int | None = None  # index after the last block that is wanted
    linears: torch.dtype | None = None  # dtype in which linears are loaded; None for the dtype of computation
    states_unused: bool = False  # the method needs no statistics, so hidden states are not passed on
    finished: int = 0  # number of blocks that an earlier process finished; they are not yielded
    restore: Callable[[Block], None] = lambda _: None  # gives a finished block its final weights
    passed: Callable[[], None] = lambda: None  # called when the hidden states have passed a block, which is done
    hidden_dir: HiddenDir | None = None  # directory for hidden states; None to keep them in memory

    @property
    def has_states(self) -> bool:
        """Return whether an earlier process left the inputs of the first unfinished block on disk."""
        return self.hidden_dir is not None and self.hidden_dir.turn is not None


def stream(
    source: ModelSource, tokens: Tokens, compute: Compute, clock: Clock, settings: StreamSettings | None = None
) -> Generator[Block]:
    """Yield each block in order. The weights that the caller leaves in it decide what the next block sees."""
    settings = settings or StreamSettings()
    states, names = _StreamedStates(source, tokens, compute, clock, settings), source.block_names[: settings.stop]
    try:
        for index, name in enumerate(names):
            if index < settings.finished and (settings.states_unused or settings.has_states):
                continue
            block = states.enter(index, name)
            if index >= settings.finished:
                yield block
            else:
                with clock("forward"):  # the weights are still the original ones
                    _pass_through(block, original=True)
                settings.restore(block)
            if not settings.states_unused and name != names[-1]:
                with clock("forward"):
                    _pass_through(block)
            settings.passed()
            source.free(source.block_tensor_names(name))
            block.kept_inputs.forget()
            release_memory()
    finally:
        states.close()


def _pass_through(block: Block, original: bool = False) -> None:
    """Replace the hidden states that enter a block, in this or the original model, by its outputs."""
    states = block.original if original else block.hidden
    if states is not None:
        with block.many_runs():
            for i in range(len(states)):
                states[i] = block.run_batch(i, original).cpu()


class _StreamedStates:
    """The hidden states of this process, which enter one block after the other."""

    def __init__(
        self, source: ModelSource, tokens: Tokens, compute: Compute, clock: Clock, settings: StreamSettings
    ) -> None:
        self.source, self.compute, self.clock, self.settings = source, compute, clock, settings
        self.portion = portion_of(tokens, settings.ranks)
        self.hidden = self._room_for("quantized")
        self.original = self._room_for("original") if settings.keep_original and len(tokens.held_out) > 0 else None
        with clock("forward"):
            batches = [] if settings.has_states else self.portion.batches
            sample, self.arguments = record_block_inputs(source, tokens.train[:1], compute, batches, self._set_first)
            self.sample = settings.ranks.share(sample).cpu()

    def _room_for(self, kind: str) -> HiddenStates:
        """Return a list, in memory or on disk, with room for the hidden states of each micro-batch."""
        width, batches = self.source.config.get_text_config().hidden_size, self.portion.batches
        if self.settings.hidden_dir is None:
            return [torch.empty(0)] * len(batches)
        shapes = [torch.Size((*batch.shape, width)) for batch in batches]
        return StoredStates(self.settings.hidden_dir, kind, shapes, self.compute.dtype)

    def _set_first(self, i: int, hidden: Tensor) -> None:  # the first block's inputs are the same in both models
        self.hidden[i] = hidden
        if self.original is not None:
            self.original[i] = hidden

    def enter(self, index: int, name: str) -> Block:
        """Return a block with its weights loaded, and with the hidden states as they are now."""
        with self.clock("read"):
            module = load_block(self.source, name, self.compute, self.settings.linears)
        states = (self.hidden, self.portion.held_out_from, self.arguments[index], self.compute, self.original)
        return Block(name, module, *states, self.settings.ranks, self.portion.shares, self.sample)

    def close(self) -> None:
        """Close the files of hidden states on disk."""
        for states in (self.hidden, self.original):
            if isinstance(states, StoredStates):
                states.close()


def load_block(source: ModelSource, name: str, compute: Compute, linears: torch.dtype | None) -> nn.Module:
    """Load the weights of a block. `linears`: dtype of its linears' weights, if it is not that of `compute`."""
    module, names = source.skeleton.get_submodule(name), source.block_tensor_names(name)
    weights = {f"{name}.{inner}.weight" for inner, m in module.named_modules() if isinstance(m, nn.Linear)}
    source.load([tensor for tensor in names if tensor in weights], compute.device, linears or compute.dtype)
    source.load([tensor for tensor in names if tensor not in weights], compute.device, compute.dtype)
    return module


@torch.no_grad()
def record_block_inputs(
    source: ModelSource,
    one: Int64[Tensor, "1 length"],
    compute: Compute,
    batches: Sequence[Tensor] = (),
    keep: Callable[[int, Tensor], None] = lambda *_: None,
) -> tuple[Float[Tensor, "1 length features"], list[Arguments]]:
    """Return the hidden states that enter the first block, and the other arguments of every block.

    Every block becomes a recorder that returns its input, so a forward runs embeddings and masks only, which is cheap.
    All blocks record, because some models give them different masks (Gemma). The arguments of one sequence serve every
    micro-batch (see `PerSequence`). Some models take a tuple from their blocks (Falcon): that is found out by trying.

    The hidden states of the sequence `one` are returned, on the device. `keep` is called for each of `batches` with its
    index and its hidden states, on the CPU. Raises RequestError if the model does not run its blocks in order, or gives
    them arguments that depend on tokens.
    """
    decoder = source.skeleton.get_decoder()
    with _outer_weights(source, decoder, compute):
        returned = _returned_by_blocks(decoder, source.blocks, one.to(compute.device))

        def calls_for(ids: Tensor) -> list[_Call]:
            with _recorders(source.blocks, returned) as calls:
                decoder(input_ids=ids.to(compute.device), use_cache=False)
            return calls

        first, two = calls_for(one), calls_for(torch.cat([one, one.flip(1)]))
        _check_calls(type(decoder).__name__, len(source.blocks), first, calls_for(one.flip(1)))
        for i, batch in enumerate(batches):
            keep(i, calls_for(batch)[0][0].cpu())
    pairs = zip(first, two, strict=True)
    return first[0][0], [_per_sequence(of_one, of_two) for (_, of_one), (_, of_two) in pairs]


def _per_sequence(of_one: Any, of_two: Any) -> Any:
    """Mark the arguments of one sequence whose first dimension doubles for two sequences."""
    if isinstance(of_one, Tensor):
        doubles = of_one.ndim > 0 and of_two.shape == (2 * len(of_one), *of_one.shape[1:])
        return PerSequence(of_one) if doubles else of_one
    if isinstance(of_one, tuple | list):
        return type(of_one)(map(_per_sequence, of_one, of_two))
    if isinstance(of_one, dict):
        return {key: _per_sequence(value, of_two[key]) for key, value in of_one.items()}
    return of_one


@contextmanager
def _outer_weights(source: ModelSource, decoder: nn.Module, compute: Compute) -> Generator[None]:
    """Load the weights of the decoder outside its blocks, such as embeddings, and free them at the end."""
    inside = {id(tensor) for tensor in decoder.state_dict(keep_vars=True).values()}
    outer = source.skeleton.state_dict(keep_vars=True)
    names = [name for name in source.outer_names() if id(outer[name]) in inside]
    source.load(names, compute.device, compute.dtype)
    move_buffers(source.skeleton, compute.device)
    yield
    source.free(names)


_Returned = Callable[[Tensor], Any]  # what a block returns, given its output
_RETURNED: tuple[_Returned, ...] = (lambda x: x, lambda x: (x,), lambda x: (x, None))


def _returned_by_blocks(decoder: nn.Module, blocks: list[nn.Module], one: Tensor) -> _Returned:
    """Return what the decoder takes from its blocks: hidden states, or a tuple that begins with them."""
    for returned in _RETURNED:
        with suppress(Exception), _recorders(blocks, returned) as calls:  # of any modelling code
            decoder(input_ids=one, use_cache=False)
            shapes = {hidden.shape for hidden, _ in calls}
            if len(calls) == len(blocks) and len(shapes) == 1:
                return returned
    return _RETURNED[0]  # whose failure says why


@contextmanager
def _recorders(blocks: list[nn.Module], returned: _Returned = _RETURNED[0]) -> Generator[list[_Call]]:
    """Make every block return its input and record its call. Only `forward` changes: attributes stay readable."""
    calls: list[_Call] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden, (args[1:], kwargs)))
        return returned(hidden)

    for block in blocks:
        block.forward = record
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


def _check_calls(name: str, blocks: int, first: list[_Call], other: list[_Call]) -> None:
    """Raise RequestError if arguments differ between two texts, or if blocks are not called one after the other."""
    if not _same(*([(args, list(kwargs.items())) for _, (args, kwargs) in calls] for calls in (first, other))):
        raise RequestError(f"the blocks of {name} take arguments that depend on the tokens; llmq cannot stream it")
    if len(first) != blocks or first[-1][0].shape != first[0][0].shape:
        raise RequestError(f"{name} does not run its blocks one after the other; llmq cannot stream it")


def _same(a: Any, b: Any) -> bool:
    """Return whether two recordings agree. An empty dictionary never agrees: blocks share it to store state."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return bool(a) and isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or bool(a == b)
