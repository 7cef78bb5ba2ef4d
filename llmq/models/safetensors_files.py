"""A directory of safetensors shards, its tensors read one at a time."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmq.core.errors import CheckpointError, RequestError
from llmq.models.untrusted_files import read_json, regular_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_MOST_PARTS = 4096
_HOW = "convert it once with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"


@runtime_checkable  # the tests check annotations as they run
class TensorFiles(Protocol):
    """What a source needs from a file format: the names, and one tensor at a time."""

    @property
    def paths(self) -> list[Path]: ...

    def names(self) -> set[str]: ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor is read. The tensor itself is not read."""
        ...

    def nbytes(self, name: str) -> int: ...

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU in its stored dtype. Raises CheckpointError if it cannot be read."""
        ...


@runtime_checkable
class CheckpointFiles(TensorFiles, Protocol):
    """What a packed checkpoint needs in addition: facts about tensors, and several of them at once."""

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def is_float(self, name: str) -> bool: ...


class SafetensorsDirectory:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    A shard is mapped for one read and unmapped with the tensor, so that resident memory does not creep up to the size
    of the model. Raises CheckpointError for a missing or corrupt shard, RequestError for a pickle checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shard_of: dict[str, Path] = {}
        self._about: dict[str, tuple[tuple[int, ...], str]] = {}
        self._stack_of: dict[str, tuple[str, int]] = {}
        for shard, names in _names_by_shard(directory).items():
            path = regular_file(directory, shard)
            present = _described(path)
            absent = sorted((names or set()) - present.keys())
            if absent:
                raise CheckpointError(f"{path} lacks {absent[0]}, which the index promises; fetch it again")
            for name in names or present:
                self._shard_of[name], self._about[name] = path, present[name]

    def split(self, parts_of: Callable[[str], tuple[str, str] | None]) -> None:
        """Give the parts of stacked tensors names of their own.

        `parts_of` returns what stands before and after the number in the names of a stack's parts; None for any other
        tensor. Raises CheckpointError for an absurd number of parts.
        """
        for stack, around in [(name, parts_of(name)) for name in sorted(self._about)]:
            if around is None:
                continue
            shape, kind = self._about.pop(stack)
            shard = self._shard_of.pop(stack)
            if len(shape) < 2 or shape[0] > _MOST_PARTS:
                raise CheckpointError(f"{self.directory}: {stack} is {shape}, and no stack of at most {_MOST_PARTS}")
            for number in range(shape[0]):
                name = f"{number}".join(around)
                if name in self._about:
                    raise CheckpointError(f"{self.directory}: {name} is stored twice, once in {stack}")
                self._about[name], self._shard_of[name] = (shape[1:], kind), shard
                self._stack_of[name] = stack, number

    @property
    def paths(self) -> list[Path]:
        return sorted(set(self._shard_of.values()))

    def names(self) -> set[str]:
        return set(self._shard_of)

    def read(self, name: str) -> Tensor:
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors as `read` does. It opens a shard once: each time its whole header is parsed."""
        shards: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            if name not in self._shard_of:
                raise CheckpointError(f"{self.directory}: no tensor is named {name}")
            shards[self._shard_of[name]].append(name)
        tensors, name = dict[str, Tensor](), ""
        for shard, inside in shards.items():
            try:
                with _open(shard) as file:
                    for name in inside:
                        stack, number = self._stack_of.get(name, (None, 0))
                        tensors[name] = file.get_tensor(name) if stack is None else file.get_slice(stack)[number]
            except (SafetensorError, RuntimeError, OSError, AttributeError, TypeError, ValueError) as error:
                # The last three come from the bindings, for types that torch has not.
                raise CheckpointError(f"{self.directory}: tensor {name} cannot be read ({error})") from None
        return tensors

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype, from the header alone if it is one of those that weights come in."""
        return _DTYPES.get(self._about[name][1]) or self.read(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, from the header alone."""
        return self._about[name][0]

    def is_float(self, name: str) -> bool:
        """Return whether a tensor holds floating-point numbers that need no scale from elsewhere."""
        return self._about[name][1] in ("F64", "F32", "F16", "BF16")

    def nbytes(self, name: str) -> int:
        """Return the bytes on disk, from the header alone."""
        bits = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
        bits |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F4": 4}
        shape, kind = self._about[name]
        return math.prod(shape) * bits.get(kind, 8) // 8


def _names_by_shard(directory: Path) -> Mapping[str, set[str] | None]:
    """Return the tensors expected in each shard file, by its name; None: whatever is there."""
    if (directory / SINGLE).exists():  # before an index, as transformers does: it may be left over from the original
        return {SINGLE: None}
    if (directory / INDEX).exists():
        shards: dict[str, set[str]] = defaultdict(set)
        listed = read_json(directory, INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
            raise CheckpointError(f"{directory / INDEX} is not a safetensors index: it maps no tensors to files")
        for name, shard in listed.items():
            shards[shard].add(name)
        return dict(shards)
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(others) == 1:  # AutoGPTQ called it gptq_model-4bit-128g.safetensors
        return {others[0]: None}
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise RequestError(f"{directory} holds pickle weights (.bin), which can run code when opened.\n{_HOW}")
    raise RequestError(f"{directory} holds neither {SINGLE} nor {INDEX}; if there are only .bin files:\n{_HOW}")


def _described(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with _open(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is corrupt or truncated ({error}); fetch it again") from None
