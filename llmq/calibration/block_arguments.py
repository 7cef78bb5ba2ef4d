"""What a decoder block takes besides hidden states, and where its values come from.

    a tensor, a number, None    the same in every run
    PerSequence                 grows with the number of sequences, but does not depend on the tokens: a mask
    PerBatch                    depends on the tokens: Gemma's per-layer inputs, Zamba's embeddings, token ids
    Shared                      a container that blocks of one forward share: Gemma's keys and values for later blocks
    Carried                     what the block before returned after its hidden states

All but the last two are known before any block has run. `SharedStates` holds those two as the text passes the blocks.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from llmq.calibration.hidden_states import BatchValues, HiddenDir

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and by name; a leaf may be one of the classes below
ModelBatch = tuple[int, bool]  # index of a micro-batch, and whether the original model runs


@dataclass(frozen=True)
class PerSequence:
    """An argument of a block that grows with the number of sequences: a mask, a bias of every head (BLOOM)."""

    of_one: Tensor  # what one sequence gets
    dim: int = 0  # the dimension that grows

    def of(self, count: int) -> Tensor:
        """Return what so many sequences get."""
        sizes = list(self.of_one.shape)
        if sizes[self.dim] == 1:
            sizes[self.dim] = count
            return self.of_one.expand(sizes)
        return self.of_one.repeat([count if dim == self.dim else 1 for dim in range(len(sizes))])


@dataclass(frozen=True)
class PerBatch:
    """An argument of a block that depends on the tokens."""

    of_sample: Tensor | PerSequence
    values: BatchValues  # by micro-batch


@dataclass(frozen=True)
class Shared:
    """An empty container that a forward gives to its blocks, which write to it and read from it."""

    index: int  # among the containers of a forward
    kind: type  # MutableMapping or list


@dataclass(frozen=True)
class Carried:
    """What the block before this one returned in addition to hidden states."""

    index: int  # 0: directly after the hidden states


@dataclass(frozen=True)
class Left:
    """What the blocks of one forward have left for later ones."""

    containers: dict[int, Any]  # by the index of `Shared`
    carried: tuple[Any, ...] = ()

    @property
    def values(self) -> list[Any]:
        """Return all that is left and not None."""
        return [value for value in tree_leaves((self.containers, self.carried)) if value is not None]


class SharedStates:
    """What blocks leave for later blocks, for each micro-batch in both models, and for the sample (key None).

    `carries`: blocks take what the block before returned.

    A block may run many times, each time with what entered it. `leave` is called after its last run. The sample runs
    first and is needed until the block is done: what it leaves is used after `next_block`.
    """

    def __init__(self, hidden_dir: HiddenDir | None = None, carries: bool = False) -> None:
        self._left, self._carries = BatchValues(hidden_dir, "shared"), carries
        self._sample = self._next_sample = Left({})
        self.is_empty = True
        """Whether no block has left anything: many models give all blocks a container that few of them use."""

    def entering(self, key: ModelBatch | None, device: torch.device) -> Left:
        """Return what enters a block. Its containers may be written to."""
        left = self._sample if key is None else Left(*self._left.get(key, ({},)))
        return Left(*tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (left.containers, left.carried)))

    def leave(self, key: ModelBatch | None, left: Left) -> None:
        """Keep what leaves a block."""
        left = Left(left.containers, left.carried if self._carries else ())
        self.is_empty = self.is_empty and not left.values
        if self.is_empty:
            return
        if key is None:
            self._next_sample = left
        else:
            self._left[key] = (left.containers, left.carried)

    def next_block(self) -> None:
        """Note that the next block is entered."""
        self._sample = self._next_sample

    def as_float32(self) -> "SharedStates":
        """Return what the sample has left for this block, in float32."""
        other = SharedStates()
        containers, carried = tree_map(as_float32, (self._sample.containers, self._sample.carried))
        other._sample = Left(containers, carried)
        return other

    @property
    def sample_bytes(self) -> int:
        """Count the bytes that the sample has left."""
        return sum(value.nbytes for value in self._next_sample.values if isinstance(value, Tensor))


def is_container(value: Any) -> bool:
    """Return whether blocks may share this argument to store something: it is a container, and still empty."""
    return isinstance(value, MutableMapping | list) and len(value) == 0


class Resolver:
    """Turns the marks in the arguments of a block into the values of one run."""

    def __init__(self, count: int, batch: int | None, left: Left | None, device: torch.device) -> None:
        self._count, self._batch, self._left, self._device = count, batch, left or Left({}), device
        self.containers: dict[int, Any] = {}
        """The containers that the block gets, by index."""

    def __call__(self, argument: Any) -> Any:
        """Return the value of one leaf of the arguments."""
        match argument:
            case PerBatch() if self._batch is not None:
                return argument.values[self._batch].to(self._device)
            case PerBatch():
                return self(argument.of_sample)
            case PerSequence():
                return argument.of(self._count)
            case Shared():
                content = self._left.containers.get(argument.index, ())
                return self.containers.setdefault(argument.index, argument.kind(content))
            case Carried():
                return self._left.carried[argument.index] if self._left.carried else None
            case _:
                return argument

    def left_by(self, output: Any) -> Left:
        """Return what a block that returned `output` leaves for later blocks."""
        # A container of any kind is stored as a plain one, which every tool for trees of tensors knows.
        plain = {index: dict(c) if isinstance(c, MutableMapping) else list(c) for index, c in self.containers.items()}
        return Left(self._left.containers | plain, tuple(output[1:]) if isinstance(output, tuple | list) else ())

    def was_written(self) -> bool:
        """Return whether the block changed one of its containers."""
        for index, container in self.containers.items():
            before = tree_leaves(self._left.containers.get(index, ()))
            after = tree_leaves(dict(container) if isinstance(container, MutableMapping) else list(container))
            if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
                return True
        return False


def as_float32(value: Any) -> Any:
    """Return an argument, or the mark of one, in float32 if it holds floats. What batches get stays as it is."""
    match value:
        case PerSequence():
            return PerSequence(as_float32(value.of_one), value.dim)
        case PerBatch():
            return PerBatch(as_float32(value.of_sample), value.values)
        case Tensor():
            return value.float() if value.is_floating_point() else value
        case _:
            return value
