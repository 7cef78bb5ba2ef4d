"""The range of what enters linears: one scale for all tokens, which learns, and where it begins.

It begins where the squared error of the rounded inputs is smallest on a few sequences. A wider range would cut nothing
off, but a few inputs of language models are hundreds of times larger than all others, which it would round to 0.
"""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.core import grid
from llmq.training.fake_quantization import per_tensor

_REMEMBERED = 4  # inputs. Between linears over one input, others can run: q_b_proj of DeepSeek between two such
_SHARES = [0.8**i for i in range(16)]  # of the largest input: 1 to 0.035


class InputRange(nn.Module):
    """Rounds inputs to 8 bits with one scale, s · f: a stored scale, and a factor that learns.

    `scale`: [1], in the dtype in which it is stored. Linears that read the same input share one InputRange, because
    engines run them as one.
    """

    scale: Tensor

    def __init__(self, scale: Float[Tensor, "1"]) -> None:
        super().__init__()
        self.dtype = scale.dtype
        self.register_buffer("scale", scale.float())
        self.factor = nn.Parameter(torch.ones_like(self.scale), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return per_tensor(x, grid.stored_scale((self.scale * self.factor).abs(), self.dtype))

    def goes_before(self, linear: nn.Module) -> None:
        """Let a linear round its inputs with this range, which becomes a part of it."""
        linear.add_module("input_range", self)
        linear.register_forward_pre_hook(lambda _, inputs: (self(inputs[0]), *inputs[1:]))

    @torch.no_grad()
    def rounded(self) -> Float[Tensor, "1"]:
        """Return the scale as it would be stored now."""
        return grid.storable((self.scale * self.factor).abs(), self.dtype)


@torch.no_grad()
def input_scales(
    model: nn.Module, linears: Mapping[str, nn.Module], sequences: Sequence[Tensor]
) -> list[tuple[list[str], float]]:
    """Return which linears read the same input, and the scale at which it is rounded best.

    Linears that no sequence reaches are left out.

    Args:
        linears: by name.
        sequences: token ids [1, length], on the device of the model.
    """
    inputs = _Inputs()
    for look in (inputs.largest, inputs.errors):
        with _watched(linears, look):
            for ids in sequences:
                model(input_ids=ids, use_cache=False)
    return inputs.found()


class _Inputs:
    """What is seen of the inputs of linears. Each input counts once, for the first linear that reads it."""

    def __init__(self) -> None:
        self._read_with: dict[str, str] = {}
        self._largest, self._errors = dict[str, Tensor](), dict[str, Tensor]()
        self._before = deque[tuple[Tensor, str]](maxlen=_REMEMBERED)

    def largest(self, name: str, x: Tensor) -> None:
        """Note the largest magnitude, and which linears read the same tensor."""
        if not x.numel():
            return
        first = next((first for before, first in self._before if before is x), name)
        if first != name:
            self._read_with[name] = first
            return
        self._before.append((x, name))
        magnitude = x.float().abs().max()
        self._largest[name] = torch.maximum(self._largest.get(name, magnitude), magnitude)

    def errors(self, name: str, x: Tensor) -> None:
        """Add the squared errors of rounding with each share of the largest magnitude."""
        if name in self._read_with or not x.numel():
            return
        exact = x.float()
        errors = torch.stack([(per_tensor(exact, scale) - exact).square().sum() for scale in self._scales(name)])
        self._errors[name] = self._errors.get(name, torch.zeros_like(errors)) + errors

    def found(self) -> list[tuple[list[str], float]]:
        """Return the names of the linears that read each input, and the scale with the smallest error."""
        members = {name: [name] for name in self._errors}
        for name, first in self._read_with.items():
            members[first].append(name)
        return [(names, float(self._scales(name)[int(self._errors[name].argmin())])) for name, names in members.items()]

    def _scales(self, name: str) -> list[Tensor]:
        step = (self._largest[name] / 127).reshape(1).clamp(min=torch.finfo(torch.float32).tiny)
        return [step * share for share in _SHARES]


@contextmanager
def _watched(linears: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Generator[None]:
    def hook(name: str) -> Any:
        return lambda _, inputs: look(name, inputs[0])

    hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
