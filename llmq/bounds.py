"""How much a config.json of strangers may make transformers build: no more than the files beside it could fill."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks

# Config classes make lists as long as these numbers say, before anything is built: kinds of layers, names of labels.
_COUNTS = {
    re.compile(r"layer|depth|block|stage|expert|dense|indices|heads"): 1_000_000,  # Gemma 3n: a vocabulary "per layer"
    re.compile(r"label|class"): 10_000,  # each gets a name
}
_MODULES_PER_TENSOR = 20  # a block of Llama has 15 modules and 9 tensors or more; some models add dropouts


def refuse_absurd(config: Any) -> None:
    """Raise ValueError for a count, anywhere in a parsed config.json, that no model has."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:  # no recursion: the nesting, too, is theirs to choose
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(name, each) for each in value]
        elif isinstance(value, int | float):
            most = min((most for names, most in _COUNTS.items() if names.search(name)), default=None)
            if most is not None and not abs(value) <= most:
                raise ValueError(f"{name} is beyond {most}")


@contextmanager
def bounded(tensors: int, numbers: int) -> Iterator[None]:
    """Raise ValueError as soon as this thread builds more modules than so many tensors fill, or one of more numbers."""
    mine, most = threading.get_ident(), 1000 + _MODULES_PER_TENSOR * tensors
    built = 0

    def count(parent: nn.Module, name: str, child: object) -> None:  # noqa: ARG001
        nonlocal built
        if threading.get_ident() != mine:
            return
        built += 1
        if built > most:
            raise ValueError(f"it describes more than {most} modules, for {tensors} tensors")
        if isinstance(child, Tensor) and child.numel() > numbers:
            raise ValueError(f"it wants a tensor of {child.numel()} numbers, more than all files could hold")

    with (
        torch_hooks.register_module_module_registration_hook(count),
        torch_hooks.register_module_parameter_registration_hook(count),
        torch_hooks.register_module_buffer_registration_hook(count),
    ):
        yield
