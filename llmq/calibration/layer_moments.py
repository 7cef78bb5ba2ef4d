"""Moments of what all experts of a layer saw together: before their first linears, and before their last one."""

from dataclasses import dataclass
from math import fsum

import torch
from jaxtyping import Float
from torch import Tensor

from llmq.calibration.block_runner import Block
from llmq.calibration.ordered_sums import ShareSums
from llmq.calibration.products import add_lower, mirrored
from llmq.models.block_structure import linear_of
from llmq.models.experts import DOWN, Layout, activated


@dataclass(frozen=True)
class LayerMoments:
    """What all experts of a block saw, at one place: before their first linears or before their last one."""

    H: Float[Tensor, "in in"]
    H_val: Float[Tensor, "in in"]  # over held-out tokens; equal to H if there are none


class LayerSums:
    """Sums over all experts, at both places."""

    def __init__(self, block: Block, name: str, layout: Layout) -> None:
        self.ranks, self.device, self.module = block.ranks, block.compute.device, block.module.get_submodule(name)
        last = linear_of(block.module, f"{name}.0.{DOWN}")
        self.shapes = {"before": (last.out_features,) * 2, "after": (last.in_features,) * 2}
        self.sums = ShareSums(self.shapes, block.ranks, self.device)
        self.tokens = {kind: [0] * layout.experts for kind in (False, True)}
        self.weights: dict[bool, list[float]] = {False: [], True: []}

    def add(
        self, X: Float[Tensor, "rows in"], rows: dict[int, Tensor], weights: dict[int, Tensor], held_out: bool
    ) -> None:
        """Add a micro-batch. `rows`, `weights`: by expert, which rows of X it gets, and how much each counts."""
        inner, of_row = list[Tensor](), torch.zeros(len(X), device=self.device)
        for expert, own in rows.items():
            weight = weights[expert]
            self.tokens[held_out][expert] += len(own)
            self.weights[held_out].append(float(weight.sum(dtype=torch.float64)))
            of_row.index_add_(0, own, weight)
            inner.append(activated(self.module, expert, X[own]).float() * weight.sqrt()[:, None])
        add_lower(self.sums.growing("before"), X.float() * of_row.sqrt()[:, None])
        if inner:
            add_lower(self.sums.growing("after"), torch.cat(inner))

    def finish(self) -> tuple[LayerMoments, LayerMoments, dict[bool, list[int]]]:
        """Return the moments before and after, and the tokens of each expert by whether held out, in every process."""
        totals, parts = self.sums.finish(), self.ranks.each((self.tokens, self.weights))

        def mean(name: str, held_out: bool) -> Tensor:
            found = totals.pop((name, held_out), None)
            found = torch.zeros(self.shapes[name], device=self.device) if found is None else found
            weight = fsum(each for _, weights in parts for each in weights[held_out])
            return mirrored(self.ranks.share(found)).div_(weight or 1.0)

        tokens = {
            kind: [sum(each) for each in zip(*(n[kind] for n, _ in parts), strict=True)] for kind in (False, True)
        }
        moments = list[LayerMoments]()
        for name in self.shapes:
            H = mean(name, False)
            moments.append(LayerMoments(H, mean(name, True) if any(tokens[True]) else H))
        return moments[0], moments[1], tokens
