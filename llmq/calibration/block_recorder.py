"""Records what enters the first decoder block, and the other arguments of every block, without running a block.

Every block becomes a recorder that returns its input, so only embeddings and masks are computed. A few forwards of one
sequence show what the model does with its blocks:

    outputs moved a little     is what a block returns what the next one gets? does any argument change with it?
    other tokens               which arguments depend on the tokens?
    two sequences              which of them grow with the number of sequences?
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from llmq.calibration.block_arguments import (
    Arguments,
    Carried,
    PerBatch,
    PerSequence,
    Shared,
    SharedStates,
    is_container,
)
from llmq.calibration.block_runner import Compute
from llmq.calibration.hidden_states import BatchValues, HiddenDir
from llmq.core.errors import RequestError, first_line
from llmq.models.decoder_blocks import decoder_of
from llmq.models.model_source import ModelSource, move_buffers

_LONGEST = 4  # most values that a block returns


@dataclass(frozen=True)
class _Extra:
    """Stands for what a block returns in addition to hidden states."""

    call: int
    index: int


@dataclass(frozen=True)
class _Call:
    """One call of a block."""

    block: int
    hidden: Tensor  # that enter it
    returned: Tensor
    leaves: list[Any]  # of its other arguments
    spec: TreeSpec  # which makes a tuple of them
    names: list[str]  # of the last arguments


_Form = Callable[[int, Tensor], Any]  # what a block returns, given the number of its call and its hidden states


def _forms() -> Iterator[_Form]:
    """Yield what a model may want from a block: hidden states, or a tuple that begins with them."""
    yield lambda _, hidden: hidden
    for length in range(1, _LONGEST + 1):
        yield lambda call, hidden, n=length: (hidden, *(_Extra(call, i) for i in range(n - 1)))
    for length in range(2, _LONGEST + 1):  # for models that look at what they get
        yield lambda _, hidden, n=length: (hidden, *[None] * (n - 1))


class Recording:
    """What a model gives to its blocks, found out with one sequence; `keep` records micro-batches of others.

    Raises RequestError if the model does not run its blocks in order, or gives them arguments of unknown origin.
    """

    def __init__(
        self, source: ModelSource, one: Int64[Tensor, "1 length"], compute: Compute, hidden_dir: HiddenDir | None
    ) -> None:
        self._decoder, self._blocks, self._compute = decoder_of(source.skeleton), source.blocks, compute
        self._hidden_dir = hidden_dir
        self.form, moved = self._form_wanted(one)
        """Makes what a block returns of the number of its call and its hidden states."""
        # Other tokens at every place, whatever the text.
        other = (one.flip(1) + 1) % source.config.get_text_config().vocab_size
        first, two = self._calls(one), self._calls(torch.cat([one, one.flip(1)]))
        self.sample = first[0].hidden
        """Hidden states of the sequence as they enter the first block, on the device."""
        grown = _growing(self.sample, two[0].hidden)
        if not isinstance(grown, PerSequence) or self.sample.shape[grown.dim] != 1:
            raise self._refusal("gives its blocks hidden states of an unknown layout")
        self.batch_dim = grown.dim
        """The dimension of hidden states that counts sequences; 0 in most models."""
        self._containers = 0
        self._per_batch: list[tuple[PerBatch, int, int]] = []  # each with a call and a position where it comes
        self._known: dict[tuple[int, ...], Any] = {}  # by the ids of what the forwards gave: most blocks get the same
        self.arguments: list[Arguments | None] = [None] * len(self._blocks)
        """Of each block; None for one that text does not run: cross-attention to a picture."""
        for number, calls in enumerate(zip(first, moved, self._calls(other), two, strict=True)):
            self.arguments[calls[0].block] = self._arguments_of(number, *calls)

    @property
    def depends_on_tokens(self) -> bool:
        """Return whether an argument depends on the tokens, so that `keep` must record every micro-batch."""
        return bool(self._per_batch)

    def shared_states(self) -> SharedStates | None:
        """Return a place for what blocks leave for later ones; None if that is hidden states alone."""
        leaves = tree_leaves(self.arguments)
        carries = any(isinstance(leaf, Carried) for leaf in leaves)
        return SharedStates(self._hidden_dir, carries) if carries or self._containers else None

    @property
    def argument_bytes(self) -> int:
        """Count the bytes that `keep` keeps for one sequence."""
        tensors = (argument.of_sample for argument, _, _ in self._per_batch)
        return sum((x.of_one if isinstance(x, PerSequence) else x).nbytes for x in tensors)

    def shape_for(self, count: int) -> torch.Size:
        """Return the shape of the hidden states of so many sequences."""
        shape = list(self.sample.shape)
        shape[self.batch_dim] = count
        return torch.Size(shape)

    def keep(self, i: int, ids: Int64[Tensor, "batch length"]) -> Tensor:
        """Keep the arguments of micro-batch i that depend on its tokens; return the first block's hidden states."""
        calls = self._calls(ids)
        for argument, call, position in self._per_batch:
            argument.values[i] = calls[call].leaves[position]
        return calls[0].hidden

    def _calls(self, ids: Tensor, form: _Form | None = None, move: float = 0.0) -> list[_Call]:
        """Run the decoder and return the calls of its blocks. Only `forward` changes: attributes stay readable."""
        calls, form = list[_Call](), form or self.form

        def record(block: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            leaves, spec = tree_flatten((*args[1:], *kwargs.values()), is_leaf=is_container)
            returned = hidden + move if move else hidden
            calls.append(_Call(block, hidden, returned, leaves, spec, list(kwargs)))
            return form(len(calls) - 1, returned)

        for i, block in enumerate(self._blocks):
            block.forward = partial(record, i)
        try:
            self._decoder(input_ids=ids.to(self._compute.device), use_cache=False)
        finally:
            for block in self._blocks:
                del block.forward
        return calls

    def _form_wanted(self, one: Tensor) -> tuple[_Form, list[_Call]]:
        """Return what the decoder takes from its blocks, and the calls of blocks that move their hidden states."""
        failures, disorders = list[str](), list[str]()
        for form in _forms():
            try:
                calls = self._calls(one, form, move=0.01)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of any modelling code
                failures.append(f"does not run while its blocks are left out ({first_line(error)})")
                continue
            order = [call.block for call in calls]
            if order[:1] != [0] or order != sorted(set(order)):
                disorders.append("does not run its blocks one after the other, each once")
            elif not all(torch.equal(a.returned, b.hidden) for a, b in pairwise(calls)):
                disorders.append("changes hidden states between its blocks")
            else:
                return form, calls
        raise self._refusal((disorders or failures)[0])

    def _refusal(self, what: str) -> RequestError:
        return RequestError(f"{type(self._decoder).__name__} {what}; llmq cannot stream it")

    def _arguments_of(self, number: int, first: _Call, moved: _Call, other: _Call, two: _Call) -> Arguments:
        """Return the arguments of one block, with marks for those that change from run to run."""
        if any((call.spec, call.names) != (first.spec, first.names) for call in (moved, other, two)):
            raise self._refusal("gives its blocks other arguments for other tokens")
        leaves = list[Any]()
        for position, values in enumerate(zip(first.leaves, moved.leaves, other.leaves, two.leaves, strict=True)):
            extra, ids = values[0], tuple(map(id, values))
            if isinstance(extra, _Extra) and extra.call == number - 1:
                leaves.append(Carried(extra.index))
                continue
            if ids not in self._known:
                self._known[ids] = self._argument(*values)
                if isinstance(self._known[ids], PerBatch):
                    self._per_batch.append((self._known[ids], number, position))
            leaves.append(self._known[ids])
        values = tree_unflatten(leaves, first.spec)
        positional = len(values) - len(first.names)
        return values[:positional], dict(zip(first.names, values[positional:], strict=True))

    def _argument(self, first: Any, moved: Any, other: Any, two: Any) -> Any:
        """Return an argument, or a mark for it."""
        if is_container(first):
            self._containers += 1
            return Shared(self._containers, type(first))
        if not _same(first, moved):
            raise self._refusal("gives its blocks arguments that depend on what earlier blocks compute")
        if not isinstance(first, Tensor):
            if not (_same(first, other) and _same(first, two)):
                raise self._refusal(f"gives its blocks a {type(first).__name__} that depends on the tokens")
            return first
        value = _growing(first, two)
        if not _same(first, other):
            of_sample = first if value is None else value
            return PerBatch(of_sample, BatchValues(self._hidden_dir, f"argument{len(self._per_batch)}"))
        if value is None or not _same(value.of(2) if isinstance(value, PerSequence) else value, two):
            raise self._refusal("gives its blocks arguments that depend on the number of sequences")
        return value


def _growing(of_one: Tensor, of_two: Any) -> Tensor | PerSequence | None:
    """Return an argument of one sequence, marked if one dimension doubles for two; None if it changes otherwise."""
    if not isinstance(of_two, Tensor) or of_two.ndim != of_one.ndim:
        return None
    dims = [dim for dim, (a, b) in enumerate(zip(of_one.shape, of_two.shape, strict=True)) if a != b]
    if len(dims) == 1 and of_two.shape[dims[0]] == 2 * of_one.shape[dims[0]]:
        return PerSequence(of_one, dims[0])
    return of_one if not dims else None


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    try:
        return a is b or bool(a == b)
    except Exception:  # of any class that a model passes
        return False


@contextmanager
def recorded(
    source: ModelSource, one: Int64[Tensor, "1 length"], compute: Compute, hidden_dir: HiddenDir | None = None
) -> Generator[Recording]:
    """Load the weights of the decoder outside its blocks, such as embeddings, and free them at the end.

    `hidden_dir`: where arguments that depend on tokens are kept; None for memory.
    """
    inside = {id(tensor) for tensor in decoder_of(source.skeleton).state_dict(keep_vars=True).values()}
    state, blocks = source.skeleton.state_dict(keep_vars=True), tuple(f"{name}." for name in source.block_names)
    names = [name for name in source.all_names if id(state[name]) in inside and not name.startswith(blocks)]
    source.load(names, compute.device, compute.dtype)
    move_buffers(source.skeleton, compute.device)
    with torch.no_grad():
        yield Recording(source, one, compute, hidden_dir)
    source.free(names)
