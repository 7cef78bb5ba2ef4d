"""What the algorithms know about a group's inputs X [tokens, in], gathered while the block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.calibration.block_runner import Block
from llmq.calibration.ordered_sums import ShareSums
from llmq.core.memory import release_memory
from llmq.core.timing import Clock
from llmq.models.block_structure import Group, linear_of

# Only the lower triangle of XᵀX is computed, in strips of this many columns: a third less arithmetic at 1536 columns
# and still wide enough for full matmul speed (2-core AVX2 machine, 2026-11: 256 and 512 alike, 128 a tenth slower).
_STRIP = 256


@dataclass
class InputStatistics:
    """Second moments of one group's input. All algorithms consume these and only these, so all of them compose."""

    H: Float[Tensor, "in in"]
    """XᵀX / tokens in float32 (the Hessian of the layer's squared output error, up to a factor of 2)."""
    H_val: Float[Tensor, "in in"]
    """The same over held-out tokens; equal to H when none are held out."""
    mean_abs: Float[Tensor, "in"]
    """Mean |x| per input channel."""
    tokens: int
    dropped: int
    """Token rows left out because they held NaN or infinity."""
    target_moment: Float[Tensor, "out in"] | None = None
    """TᵀX / tokens, where T is what the outputs X Wᵀ lack of the original model's, X_o Wᵀ - X Wᵀ; where these are added
    to a residual stream, T is what the sum lacks."""
    target_moment_val: Float[Tensor, "out in"] | None = None
    """The same over held-out tokens."""


def collect_statistics(block: Block, groups: list[Group], clock: Clock, last: bool = True) -> list[InputStatistics]:
    """Run the block over all micro-batches and gather the statistics of the groups' inputs.

    Args:
        groups: those whose inputs are wanted; the block runs up to the last one of them.
        last: the block will not run on the original model's hidden states again; its outputs take their place.
    """
    sums = [_Sums(group, block) for group in groups]
    names = {name for group in groups for name in (group.linears[0], group.residual) if name}
    with block.many_runs():
        for share in block.shares:
            for i in share.batches:
                inputs, originals = _run(block, i, names, clock, last)
                with clock("statistics"):
                    for each in sums:
                        each.add(inputs, originals, share.held_out)
            with clock("statistics"):
                for each in sums:
                    each.sums.fold(share)
    if last:
        block.forget_original()
    with clock("statistics"):
        release_memory()
        return [each.finish() for each in sums]


def _run(
    block: Block, i: int, names: set[str], clock: Clock, last: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What enters the modules of these names for micro-batch i, in this model and in the original one."""
    originals: dict[str, Tensor] = {}
    if block.original is not None:
        originals[""] = block.original[i]
        with clock("forward"), _inputs(block, names, originals, stop=not last):
            output = block.run_batch(i, original=True)
            if last:
                block.original[i] = output.cpu()
    inputs = {"": block.hidden[i]}
    if names:
        with clock("forward"), _inputs(block, names, inputs, stop=True):
            block.run_batch(i)
    return inputs, originals


class _EnoughError(Exception):
    """Every input has been seen: what follows in the block need not run."""


@contextmanager
def _inputs(block: Block, names: set[str], inputs: dict[str, Tensor], stop: bool) -> Iterator[None]:
    """Keep the inputs of the modules of these names; with `stop`, leave out what follows the last one of them."""

    modules = {block.module.get_submodule(name): name for name in names}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[modules[module]] = args[0]
        if stop and names <= inputs.keys():
            raise _EnoughError

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        with suppress(_EnoughError):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Sums over token rows, of H only the lower triangle until `finish`.

    Memory: what is returned, and one more of each while it grows.
    """

    def __init__(self, group: Group, block: Block) -> None:
        self.first, self.residual, self.ranks = group.linears[0], group.residual, block.ranks
        self.paired = block.original is not None
        self.precision, self.device = block.compute.precision, block.compute.device
        self.tokens = self.tokens_val = self.dropped = 0
        self.W = torch.cat([linear_of(block.module, name).weight.data for name in group.linears])
        out, width = self.W.shape
        self.narrow = target_moment_is_narrow(group, out, width)
        target_moment = {"target_moment": (out if self.narrow else width, width)} if self.paired else {}
        self.shapes: dict[str, tuple[int, ...]] = {"H": (width, width), "abs": (width,)} | target_moment
        self.sums = ShareSums(self.shapes, block.ranks, self.device)

    def add(self, inputs: dict[str, Tensor], originals: dict[str, Tensor], held_out: bool) -> None:
        """Inputs of the block's modules by name, in this model and, where it runs along, in the original one."""
        X, dX, dR = self._rows(inputs, originals)
        X32 = X.float()
        _add_lower(self.sums.growing("H"), X32)
        self.sums.growing("abs").add_(X32.abs().sum(0))
        if held_out:
            self.tokens_val += len(X)
        else:
            self.tokens += len(X)
        if dX is not None:
            T = self._product(dX, self.W.T) if self.narrow else dX
            self.sums.growing("target_moment").add_(self._product((T if dR is None else T + dR).T, X))

    def _rows(
        self, inputs: dict[str, Tensor], originals: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """X, X_original - X, R_original - R, one row per token, without the rows of tokens that are not finite."""

        def difference(name: str | None) -> Tensor | None:
            if not self.paired or name is None:
                return None
            return (originals[name].to(X.device) - inputs[name].to(X.device)).flatten(0, -2)

        X = inputs[self.first].flatten(0, -2)
        dX, dR = difference(self.first), difference(self.residual)
        known = [each for each in (X, dX, dR) if each is not None]
        # One reduction finds the rare bad batch: a sum is finite only if every term is.
        if all(bool(torch.isfinite(each.sum(dtype=torch.float32))) for each in known):
            return X, dX, dR
        finite = torch.stack([torch.isfinite(each).all(1) for each in known]).all(0)
        self.dropped += int((~finite).sum())
        return X[finite], None if dX is None else dX[finite], None if dR is None else dR[finite]

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        """Of differences, in which rounding is nothing beside the noise of what is averaged."""
        return (A.to(self.precision) @ B.to(self.precision)).float()

    def finish(self) -> InputStatistics:
        totals = self.sums.finish()
        counts = self.ranks.each((self.tokens, self.tokens_val, self.dropped))
        tokens, tokens_val, dropped = (sum(column) for column in zip(*counts, strict=True))
        kinds = {False: tokens, True: tokens_val} if tokens_val else {False: tokens}
        means: dict[tuple[str, bool], Tensor] = {}
        for name, shape in self.shapes.items():
            for held_out, count in kinds.items():
                total = totals.pop((name, held_out), None)
                total = torch.zeros(shape, device=self.device) if total is None else total
                means[name, held_out] = self.ranks.share(total).div_(max(1, count))
        H = _mirrored(means["H", False])
        H_val = _mirrored(means["H", True]) if tokens_val else H
        target_moment, target_moment_val = means.get(("target_moment", False)), means.get(("target_moment", True))
        if target_moment is not None and target_moment_val is not None and not self.narrow:
            target_moment, target_moment_val = (
                self.W.float() @ target_moment,
                self.W.float() @ target_moment_val,
            )
        return InputStatistics(H, H_val, means["abs", False], tokens, dropped, target_moment, target_moment_val)


def target_moment_is_narrow(group: Group, out: int, width: int) -> bool:
    """Whether the sum grows as TᵀX, not as (X_o - X)ᵀX of width x width, which W makes TᵀX of in the end.

    Two products with T for every token, or one of square size. T may have something added to it.
    """
    return group.residual is not None or 2 * out < width


def _add_lower(H: Tensor, X: Tensor) -> None:
    for start in range(0, len(H), _STRIP):
        stop = min(start + _STRIP, len(H))
        H[start:stop, :stop].addmm_(X[:, start:stop].T, X[:, :stop])


def _mirrored(H: Tensor) -> Tensor:
    """The lower triangle above the diagonal too, in place."""
    for start in range(0, len(H), _STRIP):
        stop = min(start + _STRIP, len(H))
        square = H[start:stop, start:stop]  # on the diagonal: full, but both halves need not agree to the last bit
        square.copy_(square.tril() + square.tril(-1).T)
        H[start:stop, stop:] = H[stop:, start:stop].T
    return H
