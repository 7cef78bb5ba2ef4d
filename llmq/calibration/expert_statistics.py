"""Statistics of the experts of a block: of the tokens that the router sends to each one, and of all of them together.

The router decides which tokens an expert gets, and it stays as it is. An expert's output is multiplied by its score s,
so its moments are H_e = Σ s² x xᵀ / Σ s². `algorithms/shrinkage.py` helps those that see few tokens.

    tokens ──► block, run once ──► what enters the experts, kept ──► expert 0: X ──► gate, up, rounded ──► X of down
                                              │                      expert 1: …
                                              └──► H of all experts, before their first linears and before the last

Experts also make up for the error ΔR that the block's output has without them, as the last linear of an MLP does (see
`algorithms/output_matching.py`). Each has the target ΔR / Σs, over the scores of the token: the experts of a token
return Σ s (ΔR / Σs) = ΔR together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.calibration.block_runner import Block
from llmq.calibration.hidden_states import HiddenStates, StoredRows, StoredStates
from llmq.calibration.input_statistics import GroupSums, InputStatistics, run_both
from llmq.calibration.layer_moments import LayerMoments, LayerSums
from llmq.core.timing import Clock
from llmq.models.block_structure import Group
from llmq.models.experts import DOWN, Layout, Routed, activated, layout_of, routed
from llmq.models.experts_apart import returning

_NO_SCORE = 1e-4  # the sum of a token's scores below which its experts cannot make up for anything


@dataclass(frozen=True)
class _Rows:
    """The tokens of one share of the text that an expert gets."""

    X: Float[Tensor, "n in"]
    weights: Float[Tensor, "n"]  # s²
    X_o: Float[Tensor, "n in"] | None = None  # in the original model
    lacking: Float[Tensor, "n out"] | None = None  # ΔR / Σs

    @staticmethod
    def together(parts: list[_Rows], width: int, device: torch.device) -> _Rows:
        if not parts:  # a share of another process
            return _Rows(torch.empty(0, width, device=device), torch.empty(0, device=device))

        def joined(name: str) -> Any:
            tensors = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
            return torch.cat(tensors).to(device) if tensors else None

        return _Rows(**{name: joined(name) for name in ("X", "weights", "X_o", "lacking")})


@dataclass(frozen=True)
class _Kept:
    """What entered the experts for one micro-batch, where the hidden states are (a device, memory, disk)."""

    X: Tensor | StoredRows  # [rows, in]
    X_o: Tensor | StoredRows | None  # the same rows in the original model
    lacking: Tensor | StoredRows | None  # ΔR / Σs of the same rows; None: experts need not make up for it
    rows: dict[int, Tensor]  # of each expert that has some
    weights: dict[int, Tensor]  # s² of these rows

    def put(self, i: int, states: HiddenStates) -> _Kept:
        """Return it where the hidden states are; i: the number of the micro-batch."""
        if isinstance(states, list):
            return self

        def moved(tensor: Any, kind: str) -> Any:
            if isinstance(states, StoredStates) and tensor is not None:
                return StoredRows(states.hidden_dir, f"{kind}-{i}", tensor)
            return None if tensor is None else tensor.cpu()

        rows, weights = ({e: t.cpu() for e, t in each.items()} for each in (self.rows, self.weights))
        X, X_o = moved(self.X, "experts"), moved(self.X_o, "experts-original")
        return _Kept(X, X_o, moved(self.lacking, "experts-lacking"), rows, weights)

    def rows_of(self, expert: int, in_both: bool) -> _Rows:
        rows = self.rows.get(expert, torch.empty(0, dtype=torch.long))
        X_o, lacking = (every[rows] if in_both and every is not None else None for every in (self.X_o, self.lacking))
        return _Rows(self.X[rows], self.weights.get(expert, rows.float()), X_o, lacking)


class ExpertStatistics:
    """The statistics of each expert of a block. Making it runs the block over the text once.

    Args:
        groups: those of the experts of one module.
        last: the original model runs for the last time, and its hidden states become the block's outputs.
        all_tokens: every expert gets every token, instead of those that are routed to it.
    """

    def __init__(
        self, block: Block, groups: list[Group], clock: Clock, last: bool = True, all_tokens: bool = False
    ) -> None:
        assert groups[0].expert is not None
        name = groups[0].expert.module
        self._block, self._module, self._clock = block, block.module.get_submodule(name), clock
        self._all_tokens = all_tokens
        layout = layout_of(self._module)
        assert layout is not None
        self._layout: Layout = layout
        self._text: list[_Kept] = []
        sums = LayerSums(block, name, layout)
        with block.many_runs():
            for share in block.shares:
                for i in share.batches:
                    X, entered = self._run(name, i, last, groups[-1].is_added)
                    with clock("statistics"), block.autocast(), torch.no_grad():
                        sums.add(X, entered.rows, entered.weights, share.held_out)
                    self._text.append(entered.put(i, block.hidden))
                with clock("statistics"):
                    sums.sums.fold(share)
        if last:
            block.forget_original()
        with clock("statistics"):
            self._before, self._after, self._tokens = sums.finish()
        self._rows: list[_Rows] = []  # of the expert whose turn it is
        self._inner_o: list[Tensor | None] = []  # what entered its last linear in the original model

    def _run(self, name: str, i: int, last: bool, is_added: bool) -> tuple[Tensor, _Kept]:
        """Return X of micro-batch i, and all that enters the experts."""
        lacking: Tensor | None = None
        if is_added and last and self._block.original is not None:
            entering, original, lacking = _run_apart(self._block, i, name, self._clock)
        else:
            inputs, originals = run_both(self._block, i, {name}, self._clock, last)
            entering, original = inputs[name], originals.get(name)
        X_o = None if original is None else _same_rows(entering, original)
        if self._all_tokens:
            everyone = torch.arange(self._layout.experts, device=entering.X.device).expand(len(entering.X), -1)
            entering = replace(entering, index=everyone, scores=None)
        return entering.X, _Kept(entering.X, X_o, lacking, *_places(entering, self._layout.experts))

    @torch.no_grad()
    def of(self, group: Group, with_target: bool = True) -> InputStatistics:
        """Return the statistics of a group over its expert's own tokens.

        The first linears of an expert come before its last one, which sees what they compute now. `with_target`: also
        return the target moments, if the original model runs.
        """
        assert group.expert is not None
        is_last = group.linears[0].endswith(DOWN)
        if is_last:
            with self._clock("forward"), self._block.autocast():
                rows = [  # those of another process's share are none, in any dtype
                    replace(rows, X=activated(self._module, group.expert.number, rows.X), X_o=X_o)
                    if len(rows.X)
                    else rows
                    for rows, X_o in zip(self._rows, self._inner_o, strict=True)
                ]
        else:
            rows = self._enter(group.expert.number, with_target)
        with self._clock("statistics"):
            return self._summed(group, rows, with_target)

    def layer(self, group: Group) -> LayerMoments:
        """Return the moments of all experts, with the weights that they had at first, where this group reads."""
        return self._after if group.linears[0].endswith(DOWN) else self._before

    def tokens(self, held_out: bool) -> list[int]:
        """Return how many tokens each expert has."""
        return self._tokens[held_out]

    def _enter(self, expert: int, with_target: bool) -> list[_Rows]:
        """Take the rows of an expert, and run it as it is in the original model."""
        self._rows, texts = [], iter(self._text)
        for share in self._block.shares:
            of_share = [batch.rows_of(expert, with_target) for batch in islice(texts, len(share.batches))]
            self._rows.append(_Rows.together(of_share, len(self._before.H), self._block.compute.device))
        with self._clock("forward"), self._block.autocast():
            self._inner_o = [None if r.X_o is None else activated(self._module, expert, r.X_o) for r in self._rows]
        return self._rows

    def _summed(self, group: Group, rows: list[_Rows], with_target: bool) -> InputStatistics:
        sums = GroupSums(group, self._block if with_target else replace(self._block, original=None))
        for share, each in zip(self._block.shares, rows, strict=True):
            if len(each.X):
                differences = [] if each.X_o is None else [each.X_o - each.X]
                if each.lacking is not None and group.is_added:
                    differences.append(each.lacking)
                sums.add_rows([each.X, *differences], share.held_out, each.weights)
            sums.sums.fold(share)
        return sums.finish()


def _run_apart(block: Block, i: int, name: str, clock: Clock) -> tuple[Routed, Routed, Float[Tensor, "rows out"]]:
    """Run a block for micro-batch i in both models, in the original one for the last time.

    Returns what enters its experts in this model and in the original one, and ΔR / Σs: what the block's output lacks
    without that of the experts, over the scores of each token.
    """
    assert block.original is not None
    seen: list[tuple[Routed, Tensor]] = []
    module = block.module.get_submodule(name)

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((routed(module, args), output.clone().float()))  # the block may add to the output in place

    with clock("forward"), module.register_forward_hook(note):
        end = block.run_batch(i, original=True, leave=True)
        block.original[i] = end
        with returning(module, torch.zeros_like):
            R = block.run_batch(i)
    (original, output), (entering, _) = seen
    dR = (end.float() - output.view_as(end) - R.float()).flatten(0, -2)
    assert entering.scores is not None
    s = entering.scores.float().sum(1, keepdim=True)
    return entering, original, torch.where(s > _NO_SCORE, dR / s, 0.0).to(entering.X.dtype)


def _places(entering: Routed, experts: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the rows of each expert that has some, and the weights s² of these rows."""
    rows, weights, k = dict[int, Tensor](), dict[int, Tensor](), entering.index.shape[1]
    for expert, places in entering.by_expert(experts):
        rows[expert] = places // k
        s = None if entering.scores is None else entering.scores.flatten()[places].float()
        weights[expert] = torch.ones(len(places), device=places.device) if s is None else s.square()
    return rows, weights


def _same_rows(entering: Routed, original: Routed) -> Tensor:
    """Return the original model's inputs of the rows of `entering`; its own where the original has no such row."""
    if entering.scores is not None:
        return original.X

    # Llama 4: the rows of an expert are those of its own tokens.
    def keys(r: Routed) -> list[tuple[int, int]]:
        return list(zip(r.index[:, 0].tolist(), r.token.tolist(), strict=True))

    places = {key: i for i, key in enumerate(keys(original))}
    X_o = entering.X.clone()
    for row, key in enumerate(keys(entering)):
        if key in places:
            X_o[row] = original.X[places[key]]
    return X_o
