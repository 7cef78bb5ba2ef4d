"""Finds linears whose weight a model reads without calling them."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmq.models.experts import layouts


def modules_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a block and their names, without the linears of experts."""
    inside = tuple(f"{name}." for name in layouts(block))
    return [(name, module) for name, module in block.named_modules() if not name.startswith(inside)]


@contextmanager
def weights_read(block: nn.Module) -> Generator[set[str]]:
    """Give the names of linears whose weight is read outside of their own call while inside.

    A packed linear has none: Mamba multiplies by the weight of dt_proj itself, DeepSeek-V3.2 asks one for its dtype.
    """
    read, classes = set[str](), dict[nn.Module, type[nn.Module]]()
    try:
        for name, module in modules_of(block):
            if isinstance(module, nn.Linear):
                classes[module] = type(module)
                module.__class__ = _watched(type(module), name, read)
        yield read
    finally:
        for module, own in classes.items():
            module.__class__ = own


def _watched(kind: type[nn.Linear], name: str, read: set[str]) -> type[nn.Linear]:
    """Return a class of linears that notes in `read` when something else reads the weight."""

    class Watched(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__["_is_running"] = True
            try:
                return super().__call__(*args, **kwargs)
            finally:
                del self.__dict__["_is_running"]

        def __getattr__(self, attribute: str) -> Any:
            if attribute == "weight" and "_is_running" not in self.__dict__:
                read.add(name)
            return super().__getattr__(attribute)

    return Watched
