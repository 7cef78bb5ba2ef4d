"""Records the operators that a function runs, and plays them back without the Python around them.

A decode step of a small model spends more time in Python (modules, masks, dispatch) than in arithmetic. Shapes are the
same in every step. So the step is run once while its operators are noted; from then on only these are run, as one
flat Python function. On a GPU a CUDA graph does the same work; see `decode_step.py`.

What the function computes with Python numbers is fixed. The caller must check that other inputs give the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

# A result that depends on weights alone is kept if it takes no more memory than this; views of weights take none.
_KEPT_BYTES = 1 << 16
# torch's bindings of these are written by hand, and take other arguments.
_OTHER_ARGUMENTS = (("to", "dtype_layout"), ("to", "device"), ("to", "other"))
_DEPENDS_ON_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class RecordingError(Exception):
    """The function looks at values of tensors, so its next run may take other operators."""


@dataclass(frozen=True)
class Ref:
    """A tensor in the arguments of a call, by number."""

    number: int


@dataclass(frozen=True)
class Like:
    """What is known of a tensor besides its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Call:
    """One call of an operator."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int | None]
    """The numbers of its results; None for a result that is no tensor."""
    single: bool
    reads: set[int]
    """The storages of its arguments."""
    makes: set[int]
    """The storages of its results."""
    quick: Callable[..., Any] | None = None
    """What is called in place of `func`."""

    def inputs(self) -> Iterator[int]:
        for leaf in tree_flatten((self.args, self.kwargs))[0]:
            if isinstance(leaf, Ref):
                yield leaf.number

    @property
    def repeatable(self) -> bool:
        """Whether equal arguments give equal results, and nothing else happens."""
        return not self.func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in self.func.tags


@dataclass
class Recording:
    """The calls that turn inputs, numbers 0 to inputs - 1, and constants into one result."""

    calls: list[Call]
    constants: dict[int, Tensor]
    likes: dict[int, Like]
    inputs: int
    result: int

    def without_unused(self) -> Recording:
        """Return the recording without calls and constants that nothing needs."""
        needed, kept = {self.result}, []
        for call in reversed(self.calls):
            if not call.repeatable or not needed.isdisjoint(call.results):
                needed |= set(call.inputs())
                kept.append(call)
        constants = {number: tensor for number, tensor in self.constants.items() if number in needed}
        return Recording(kept[::-1], constants, self.likes, self.inputs, self.result)


class _Recorder(TorchDispatchMode):
    """Notes every operator. Tensors that come from outside are constants."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.numbers: Any = WeakTensorKeyDictionary()  # intermediate results may be freed while recording
        self.constants: dict[int, Tensor] = {}
        self.likes: dict[int, Like] = {}
        self.calls: list[Call] = []
        self.written: set[int] = set()
        self.kept: dict[int, Tensor] = {}
        """Results that depend on constants alone: small ones, and views of constants."""
        for tensor in inputs:
            self._numbered(tensor)

    def _numbered(self, tensor: Tensor) -> int:
        """Return the number of a tensor: a new one, unless it has one already."""
        if tensor not in self.numbers:
            number = len(self.likes)
            self.numbers[tensor] = number
            self.likes[number] = Like(tuple(tensor.shape), tensor.stride(), tensor.dtype)
        return self.numbers[tensor]

    def number_of(self, tensor: Tensor) -> int:
        """Return the number of an argument. One that no noted operator made is a constant from now on."""
        if tensor not in self.numbers:
            self.constants[self._numbered(tensor)] = tensor
        return self.numbers[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        tensors = [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]
        by_place = func is torch.ops.aten.index.Tensor and all(t.dtype != torch.bool for t in tensors[1:])
        if any(tag in func.tags for tag in _DEPENDS_ON_VALUES) and not by_place:
            raise RecordingError(str(func))
        noted: Any = tree_map(lambda leaf: Ref(self.number_of(leaf)) if isinstance(leaf, Tensor) else leaf, given)
        out = func(*given[0], **given[1])
        if func._schema.is_mutable:
            self.written |= set(map(_storage, tensors))
        single = isinstance(out, Tensor)
        if not single and not isinstance(out, (list, tuple)):  # a number, which Python asked for
            raise RecordingError(str(func))
        outs = [out] if single else list(out)
        # What writes into its argument returns that argument, which has its number already.
        results = [self._numbered(tensor) if isinstance(tensor, Tensor) else None for tensor in outs]
        reads, makes = (set(map(_storage, each)) for each in (tensors, [t for t in outs if isinstance(t, Tensor)]))
        call = Call(func, noted[0], noted[1], results, single, reads, makes)
        self.calls.append(call)
        if call.repeatable and all(number in self.constants or number in self.kept for number in call.inputs()):
            for number, tensor in zip(results, outs, strict=True):
                if number is not None and (tensor.nbytes <= _KEPT_BYTES or _storage(tensor) in call.reads):
                    self.kept[number] = tensor
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


@torch.inference_mode()
def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Recording]:
    """Run function(*inputs) once. Return its result, and the operators that it ran.

    Args:
        function: takes tensors, returns one tensor. What it writes into other tensors (a cache) will be written again.
        inputs: tensors; later inputs must have the same shapes and dtypes.

    Raises RecordingError if an operator's result depends on values in a way that Python could look at.
    """
    recorder = _Recorder(inputs)
    with recorder:
        result = function(*inputs)
    return result, _simplified(recorder, len(inputs), recorder.number_of(result))


def _simplified(recorder: _Recorder, inputs: int, result: int) -> Recording:
    """Leave out what does nothing, depends on constants alone, was computed before, or is needed by nobody."""
    constants, calls = dict(recorder.constants), []
    same: dict[int, int] = {}
    known: dict[Any, list[int | None]] = {}

    def now(leaf: Any) -> Any:
        return Ref(same.get(leaf.number, leaf.number)) if isinstance(leaf, Ref) else leaf

    for call in recorder.calls:
        call.args, call.kwargs = tree_map(now, (call.args, call.kwargs))
        unchanged = (call.reads | call.makes).isdisjoint(recorder.written)
        numbers = [number for number in call.results if number is not None]
        kept = [recorder.kept.get(number) for number in numbers]
        if call.repeatable:
            if set(numbers) <= set(call.inputs()):
                continue
            if constants.keys() >= set(call.inputs()) and all(
                tensor is not None and (unchanged or _storage(tensor) in call.reads) for tensor in kept
            ):
                constants.update({n: tensor for n, tensor in zip(numbers, kept, strict=True) if tensor is not None})
                continue
            if unchanged:
                key = call.func, repr((call.args, call.kwargs))
                if key in known:
                    same.update(
                        {n: m for n, m in zip(call.results, known[key], strict=True) if n is not None and m is not None}
                    )
                    continue
                known[key] = call.results
        calls.append(call)
    return Recording(calls, constants, recorder.likes, inputs, same.get(result, result)).without_unused()


def compiled(recording: Recording) -> Callable[..., Tensor]:
    """Return the calls as one Python function of the inputs. Each value is freed after its last use."""
    names: dict[str, Any] = {f"t{number}": tensor for number, tensor in recording.constants.items()}
    last = {number: i for i, call in enumerate(recording.calls) for number in call.inputs()}
    permanent = {*range(recording.inputs), *recording.constants, recording.result}
    lines: list[str] = []

    def named(prefix: str, value: Any) -> str:
        name = f"{prefix}{len(names)}"
        names[name] = value
        return name

    def text(leaf: Any) -> str:
        if isinstance(leaf, Ref):
            return f"t{leaf.number}"
        if isinstance(leaf, (list, tuple)):
            return "[" + ", ".join(map(text, leaf)) + "]"
        return repr(leaf) if leaf is None or isinstance(leaf, (bool, int)) else named("k", leaf)

    for i, call in enumerate(recording.calls):
        function = named("f", call.quick or _quickest(call.func))
        arguments = [*map(text, call.args), *(f"{key}={text(leaf)}" for key, leaf in call.kwargs.items())]
        targets = ["_" if number is None else f"t{number}" for number in call.results]
        target = targets[0] if call.single else "[" + ", ".join(targets) + "]"
        lines.append(f"{target} = {function}({', '.join(arguments)})")
        dead = [f"t{n}" for n in sorted(set(call.inputs()) - permanent) if last[n] == i]
        if dead:
            lines.append(" = ".join(dead) + " = None")
    # Constants are default arguments: a local name is found faster than a global one.
    head = ", ".join([*(f"t{n}" for n in range(recording.inputs)), *(f"{name}={name}" for name in names)])
    source = f"def play({head}):\n    " + "\n    ".join([*lines, f"return t{recording.result}"])
    exec(compile(source, "<recorded step>", "exec"), names)
    return torch.inference_mode()(names["play"])


def _quickest(func: Any) -> Callable[..., Any]:
    """Return torch's own binding of an operator, which parses arguments three times as fast as `torch.ops`."""
    space, _, name = func._schema.name.partition("::")
    if space == "aten" and (name, func._overloadname) not in _OTHER_ARGUMENTS:
        for home in (torch, torch.Tensor, torch._C._nn):  # pyright: ignore
            binding: Any = getattr(home, name, None)
            if type(binding) in (type(len), type(str.join)):  # not a function in Python, which may do other things
                return binding
    return func
