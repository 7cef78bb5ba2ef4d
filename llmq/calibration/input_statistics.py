"""Statistics of a group's inputs X [tokens, in], summed while the block runs. Algorithms see these, never the text."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.calibration.block_runner import Block
from llmq.calibration.ordered_sums import ShareSums
from llmq.calibration.products import add_lower, add_product, finite_rows, mirrored
from llmq.core.device import numbers, on_host
from llmq.core.memory import release_memory
from llmq.core.timing import Clock
from llmq.models.block_structure import Group, linear_of
from llmq.models.experts import layout_of, routed

_Inputs = dict[str, Any]  # by the name of a linear, or "" for the block: a tensor; of experts: what is routed where


@dataclass
class InputStatistics:
    """Moments of one group's input. All algorithms use these and nothing else, so any of them can be combined.

    X, X_o    inputs [tokens, in] in the model quantized so far, and of the same tokens in the original model
    R, R_o    residual streams to which the outputs are added, in both models; 0 if they are not added
    T         (X_o - X) Wᵀ + R_o - R, the target: X Wᵀ + R lacks this of the original model's X_o Wᵀ + R_o
    """

    H: Float[Tensor, "in in"]  # XᵀX / tokens in float32 (half the Hessian of the layer's squared output error)
    H_val: Float[Tensor, "in in"]  # the same over held-out tokens; equal to H if none are held out
    tokens: int
    dropped: int  # number of tokens that were left out because of NaN or infinity
    target_moment: Float[Tensor, "out in"] | None = None  # TᵀX / tokens; None if the original model does not run
    target_moment_val: Float[Tensor, "out in"] | None = None  # the same over held-out tokens
    mean_abs: Float[Tensor, "in"] | None = None  # mean |x| of each input channel, for methods that ask for it
    borrowed: float = 0.0  # the share of H that comes from all experts of the layer; see expert_statistics.py


def collect_statistics(
    block: Block, groups: list[Group], clock: Clock, last: bool = True, magnitudes: bool = False
) -> list[InputStatistics]:
    """Run the block over all micro-batches, up to the last group's input, and return the statistics of each group.

    Args:
        last: the original model runs for the last time, so its hidden states are replaced by the block's outputs.
        magnitudes: also return `mean_abs`.
    """
    sums = [GroupSums(group, block, magnitudes) for group in groups]
    names = {name for group in groups for name in (group.linears[0], group.residual) if name}
    with block.many_runs():
        for share in block.shares:
            for i in share.batches:
                inputs, originals = run_both(block, i, names, clock, last)
                with clock("statistics"):
                    for group_sums in sums:
                        group_sums.add(inputs, originals, share.held_out)
            with clock("statistics"):
                for group_sums in sums:
                    group_sums.sums.fold(share)
    if last:
        block.forget_original()
    with clock("statistics"):
        release_memory()
        return [group_sums.finish() for group_sums in sums]


def run_both(block: Block, i: int, names: set[str], clock: Clock, last: bool) -> tuple[_Inputs, _Inputs]:
    """Return the inputs of these modules for micro-batch i, in this model and in the original one; "" is the block.

    The input of a module of experts is a `Routed`.
    """
    originals: _Inputs = {}
    if block.original is not None:
        originals[""] = block.original[i]
        with clock("forward"), _inputs(block, names, originals, stop=not last):
            output = block.run_batch(i, original=True, leave=last)
            if last:
                block.original[i] = output
    inputs: _Inputs = {"": block.hidden[i]}
    if names:
        with clock("forward"), _inputs(block, names, inputs, stop=True):
            block.run_batch(i)
    return inputs, originals


class _AllSeenError(Exception):
    """Every input has been seen, so the remainder of the block need not run."""


@contextmanager
def _inputs(block: Block, names: set[str], inputs: _Inputs, stop: bool) -> Generator[None]:
    """Store the inputs of these modules in `inputs`. `stop`: end the run after the last of them."""
    modules = {block.module.get_submodule(name): name for name in names}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[modules[module]] = args[0] if layout_of(module) is None else routed(module, args)
        if stop and names <= inputs.keys():
            raise _AllSeenError

    with ExitStack() as handles, suppress(_AllSeenError):
        for module in modules:
            handles.enter_context(module.register_forward_pre_hook(hook))
        yield


class GroupSums:
    """Sums of H and the target moment over the tokens of one group. Of H, only the lower triangle is summed.

    On a GPU nothing is read before `finish`: to read a number is to wait for all work that is queued.
    """

    def __init__(self, group: Group, block: Block, magnitudes: bool = False) -> None:
        self.linear, self.ranks, self.device = group.linears[0], block.ranks, block.compute.device
        self.factors, self.entered = block.compute.factors, 0
        # Of each micro-batch, by whether it is held out: its tokens, and their weights, which divide the sums in the
        # end. fsum is exact, so that no number of processes changes a bit.
        self.tokens: dict[bool, list[int | Tensor]] = {False: [], True: []}
        self.weights: dict[bool, list[float | Tensor]] = {False: [], True: []}
        self.target = None if block.original is None else _TargetMoment(group, block)
        width = linear_of(block.module, self.linear).in_features
        self.shapes: dict[str, tuple[int, ...]] = {"H": (width, width)} | ({"abs": (width,)} if magnitudes else {})
        if self.target is not None:
            self.shapes["target_moment"] = self.target.shape
        self.sums = ShareSums(self.shapes, block.ranks, self.device)

    def add(self, inputs: _Inputs, originals: _Inputs, held_out: bool) -> None:
        """Add a micro-batch, given the inputs of modules by name, in this model and in the original one.

        A linear that gets no token of it has no input, and nothing is added.
        """
        if self.linear in inputs:
            differences = [] if self.target is None else self.target.differences(inputs, originals)
            self.add_rows([inputs[self.linear].flatten(0, -2), *differences], held_out)

    def add_rows(
        self, rows: list[Float[Tensor, "n _"]], held_out: bool, weights: Float[Tensor, "n"] | None = None
    ) -> None:
        """Add X, X_o - X and R_o - R (the latter two if there is a target) of some tokens. `weights`: 1 if None.

        X is rounded first, as the linears do that multiply it. Weighted rows are float32.
        """
        self.entered += len(rows[0])
        rows = [rows[0].to(self.factors), *rows[1:]]
        if weights is None:
            (X, *differences), count = finite_rows(rows)
            self.weights[held_out].append(count)
        else:
            (X, *differences, weight), count = finite_rows([*rows, weights[:, None]])
            self.weights[held_out].append(on_host(weight.sum(dtype=torch.float64)))
            X, *differences = (tensor * weight.sqrt() for tensor in (X, *differences))
        self.tokens[held_out].append(count)
        add_lower(self.sums.growing("H"), X)
        if "abs" in self.shapes:
            self.sums.growing("abs").add_(X.float().abs().sum(0))
        if self.target is not None:
            self.target.add_to(self.sums.growing("target_moment"), X, *differences)

    def finish(self) -> InputStatistics:
        """Return the statistics over the tokens of all processes, in every process."""
        totals, parts = self.sums.finish(), self.ranks.each((self.entered, *self._counts()))
        entered = sum(part[0] for part in parts)
        tokens, tokens_val = (sum(part[1][kind] for part in parts) for kind in (False, True))
        weight, weight_val = (fsum(w for part in parts for w in part[2][kind]) for kind in (False, True))

        def mean(name: str, held_out: bool = False) -> Tensor:
            total = totals.pop((name, held_out), None)
            total = torch.zeros(self.shapes[name], device=self.device) if total is None else total
            return self.ranks.share(total).div_((weight_val if held_out else weight) or 1)

        H = mirrored(mean("H"))
        H_val = mirrored(mean("H", True)) if tokens_val else H
        statistics = InputStatistics(H, H_val, tokens, entered - tokens - tokens_val)
        if "abs" in self.shapes:
            statistics.mean_abs = mean("abs")
        if self.target is not None:
            statistics.target_moment = self.target.finished(mean("target_moment"))
            if tokens_val:
                statistics.target_moment_val = self.target.finished(mean("target_moment", True))
        return statistics

    def _counts(self) -> tuple[dict[bool, int], dict[bool, list[float]]]:
        """Return the number of tokens, and the weight of each micro-batch, of this process."""
        kinds = (False, True)
        lists = [each[kind] for each in (self.tokens, self.weights) for kind in kinds]
        read = iter(numbers([value for values in lists for value in values]))
        tokens, tokens_val, *weights = ([next(read) for _ in values] for values in lists)
        return {False: int(sum(tokens)), True: int(sum(tokens_val))}, dict(zip(kinds, weights, strict=True))


class _TargetMoment:
    """The sum of TᵀX of one group, computed in the cheaper of two ways (see `target_moment_is_narrow`)."""

    def __init__(self, group: Group, block: Block) -> None:
        self.factors, self.fold = block.compute.factors, block.folds.get(group.linears[0])
        self.names = [name for name in (group.linears[0], group.residual) if name is not None]
        self.W = torch.cat([linear_of(block.module, name).weight.data for name in group.linears])
        out, width = self.W.shape
        self.narrow = target_moment_is_narrow(group, out, width)
        if self.narrow:  # rounded once, not for every micro-batch
            self.W = self.W.to(self.factors)
        self.shape = (out if self.narrow else width, width)

    def differences(self, inputs: dict[str, Tensor], originals: dict[str, Tensor]) -> list[Tensor]:
        """Return X_o - X and, if there is a residual stream, R_o - R: one row for each token.

        If X was divided by a fold, so is X_o here: W has been multiplied by it.
        """
        device = inputs[self.names[0]].device
        # An expert may get other tokens in the original model. Then nothing is known of what it lacks.
        alike = all(name in originals and originals[name].shape == inputs[name].shape for name in self.names)
        wanted = [(originals if alike else inputs)[name].to(device) for name in self.names]
        if self.fold is not None and alike:
            wanted[0] = wanted[0] / self.fold
        return [(a - inputs[name].to(device)).flatten(0, -2) for a, name in zip(wanted, self.names, strict=True)]

    def add_to(self, total: Tensor, X: Tensor, dX: Tensor, dR: Tensor | None = None) -> None:
        """Add TᵀX of a micro-batch to `total`, or (X_o - X)ᵀX if the sum is wide.

        All products are in low precision: rounding is small beside the noise of the differences that are averaged.
        """
        T = self._rounded(dX) @ self.W.T if self.narrow else dX
        T = self._rounded(T if dR is None else T + dR)
        if total.device.type == "cpu":
            total.add_(T.T @ self._rounded(X))
        else:
            add_product(total, T.T, self._rounded(X))

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.factors)

    def finished(self, mean: Tensor) -> Tensor:
        """Return TᵀX / tokens, given the mean of the terms that were added."""
        return mean if self.narrow else self.W.float() @ mean


def target_moment_is_narrow(group: Group, out: int, width: int) -> bool:
    """Return whether TᵀX [out, width] is summed. If not, (X_o - X)ᵀX [width, width] is, and W multiplies it at the end.

    The narrow sum takes two products of out x width for every token, the wide one takes one of width x width. With a
    residual stream only the narrow sum is possible, because W does not multiply R_o - R.
    """
    return group.residual is not None or group.is_added or 2 * out < width
