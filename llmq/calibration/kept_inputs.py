"""Inputs that a block keeps from one run to the next, so that attention and MLP do not run again for every group.

The block runs once before each group is replaced, and once more at the end. Attention and MLP are submodules that end
with a linear (o_proj, down_proj). Once every group before this last linear is replaced, its input is final.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.block_structure import Group, Submodule, linear_of

_MOST_KEPT, _MOST_KEPT_ON_GPU = 1 << 30, 1 << 32

_Key = tuple[str, int, bool]  # name of a last linear, index of a micro-batch, and whether the original model runs


def most_kept(device: torch.device) -> int:
    """Return the largest number of bytes that a block keeps, where it computes. What does not fit is computed again.

    On a GPU: what attention returns for 128 x 2048 tokens of a 7B model, in 2 bytes and in both models.
    """
    return _MOST_KEPT if device.type == "cpu" else _MOST_KEPT_ON_GPU


class KeptInputs:
    """Keeps the input of each submodule's last linear, and later its output instead.

    Each last linear has a state for every micro-batch and for both models (the one quantized so far, the original):

        state         a run of the block …         next state
        unknown       runs the submodule           input kept, in a run after every earlier group was replaced
        input kept    runs the last linear only    output kept, in a run after the linear itself was replaced
        output kept   runs nothing of it           dropped, in the last run that was announced
        dropped       runs the submodule

    The original model keeps its weights, so it does not wait for replacements. A state stays unknown if the input does
    not fit within `most_kept`, or if no further run was announced. If the last run computes an output, it is dropped at
    once. All states become unknown by `forget`, and when a weight is replaced for a second time.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._waiting: list[set[str]] = []  # groups that are not replaced yet: names of linears with their old weight
        self._submodules: dict[str, Submodule] = {}  # by the name of the last linear
        self._inputs: dict[_Key, Tensor] = {}
        self._outputs: dict[_Key, Tensor] = {}

    def expect(self, stages: list[list[Group]]) -> None:
        """Announce the groups that will be replaced, in order. The block runs once before each stage."""
        groups = [group for stage in stages for group in stage]
        self._waiting = [{name for group in stage for name in group.linears} for stage in stages]
        # Statistics need the inputs of these modules in every run, so a submodule that contains one is never skipped.
        residuals = {group.residual for group in groups if group.residual}
        for group in groups:
            if group.ends and not any(name.startswith(group.ends.name + ".") for name in residuals):
                self._submodules[group.linears[0]] = group.ends

    def replaced(self, name: str) -> None:
        """Note that a linear has got a new weight."""
        waiting = [left for linears in self._waiting if (left := linears - {name})]
        if waiting == self._waiting:  # a second replacement: what was kept came from the first one
            self.forget()
        self._waiting = waiting

    def forget(self) -> None:
        """Drop everything that was kept."""
        self._inputs.clear()
        self._outputs.clear()

    @contextmanager
    def used(self, i: int, original: bool) -> Generator[None]:
        """Make a run of the block on micro-batch i skip what is kept, and keep what has become final."""
        with ExitStack() as undo:
            for name, submodule in self._submodules.items():
                key = (name, i, original)
                if key in self._inputs or key in self._outputs:
                    module = self._module.get_submodule(submodule.name)
                    module.forward = partial(self._skip, key, submodule)
                    undo.callback(delattr, module, "forward")
                elif self._runs_again(original) and (original or name in self._waiting[0]):
                    keep = partial(self._keep_input, key)
                    undo.enter_context(linear_of(self._module, name).register_forward_pre_hook(keep, prepend=True))
            yield

    def _keep_input(self, key: _Key, _linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept = sum(tensor.nbytes for tensor in (*self._inputs.values(), *self._outputs.values()))
        if kept + args[0].nbytes <= most_kept(self._device):
            self._inputs[key] = args[0]

    def _skip(self, key: _Key, submodule: Submodule, *_: Any, **__: Any) -> Any:
        """Return what the submodule returns, computed from what is kept. Stands in for its `forward`."""
        name, _i, original = key
        if key in self._outputs:
            output = self._outputs[key]
        else:
            output = linear_of(self._module, name)(self._inputs[key])
            if original or name not in set[str]().union(*self._waiting):
                del self._inputs[key]
                self._outputs[key] = output
        if not self._runs_again(original):
            del self._outputs[key]
        return output if submodule.returns is None else (output, *[None] * (submodule.returns - 1))

    def _runs_again(self, original: bool) -> bool:
        """Return whether this model runs again after the current run. The original one has no run at the end."""
        return len(self._waiting) > (1 if original else 0)
