"""Statistics of the experts of a block: of the tokens routed to each one, shrunk towards those of all experts.

The router decides which tokens an expert gets, and it stays as it is. So a rare expert e sees few tokens, and its
H_e = Σ s² x xᵀ / Σ s² is a noisy estimate (s: the score that its output is multiplied by; an error of the expert counts
by s²). The layer's H, over all tokens and experts, has little noise, but it is another expert's as much as e's. Between
them lies (Ledoit and Wolf 2004, doi 10.1016/S0047-259X(03)00096-4)

    (1 - λ_e) H_e + λ_e H,     λ_e = c r_e / |H_e - H|²,     r_e = 1 / n_e - 1 / Σ n,     0 ≤ λ_e ≤ 1

which has the least expected distance to the expert's true moments: n_e tokens leave noise c / n_e in H_e, and
|H_e - H|² holds that noise and the true distance. Held-out text gives c in closed form, because its moments V_e have
noise of their own: E ⟨H_e - V_e, H_e - H⟩ = c r_e. What deviates from the paper: c is one number for all experts of a
block, so that an expert without held-out tokens has one, too. Distances are taken over at most `_CHANNELS` channels,
each divided by its root mean square, so that no channel of large values decides alone.

An expert that saw nothing has λ = 1. The target moment shrinks with 1 - λ_e, and the held-out one likewise: so outputs
are matched as far as the expert's own tokens say something about them (`algorithms/output_matching.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from math import fsum

import torch
from jaxtyping import Float
from torch import Tensor

from llmq.calibration.block_runner import Block
from llmq.calibration.hidden_states import HiddenStates, StoredRows, StoredStates
from llmq.calibration.input_statistics import GroupSums, InputStatistics, add_lower, mirrored, run_both
from llmq.calibration.ordered_sums import ShareSums
from llmq.core.timing import Clock
from llmq.models.block_structure import Group, linear_of
from llmq.models.experts import DOWN, Layout, Routed, activated, layout_of

# Channels that distances are taken over. TODO measured
_CHANNELS = 128


@dataclass(frozen=True)
class _Rows:
    """The tokens of one share of the text that an expert gets."""

    X: Float[Tensor, "n in"]
    X_o: Float[Tensor, "n in"] | None  # in the original model
    weights: Float[Tensor, "n"]  # s²

    @staticmethod
    def together(parts: list[_Rows], width: int) -> _Rows:
        if not parts:  # a share of another process
            return _Rows(torch.empty(0, width), None, torch.empty(0))
        X_o = [part.X_o for part in parts if part.X_o is not None]
        X, weights = (torch.cat([getattr(part, name) for part in parts]) for name in ("X", "weights"))
        return _Rows(X, torch.cat(X_o) if X_o else None, weights)

    def to(self, device: torch.device) -> _Rows:
        return _Rows(self.X.to(device), None if self.X_o is None else self.X_o.to(device), self.weights.to(device))


@dataclass(frozen=True)
class _Kept:
    """What entered the experts for one micro-batch, where the hidden states are: in memory or on disk."""

    X: Tensor | StoredRows  # [rows, in]
    X_o: Tensor | StoredRows | None  # the same rows in the original model
    rows: dict[int, Tensor]  # of each expert that has some
    weights: dict[int, Tensor]  # s² of these rows

    def rows_of(self, expert: int) -> _Rows:
        rows = self.rows.get(expert, torch.empty(0, dtype=torch.long))
        return _Rows(self.X[rows], None if self.X_o is None else self.X_o[rows], self.weights.get(expert, rows.float()))


@dataclass(frozen=True)
class _Batch:
    """What enters the experts for one micro-batch."""

    X: Float[Tensor, "rows in"]
    X_o: Float[Tensor, "rows in"] | None  # the same rows in the original model
    rows: dict[int, Tensor]  # of each expert that has some
    weights: dict[int, Tensor]  # s² of these rows

    def kept(self, i: int, states: HiddenStates) -> _Kept:
        """Keep the inputs of this micro-batch, the i-th, where the hidden states are."""

        def keep(X: Tensor, kind: str) -> Tensor | StoredRows:
            return StoredRows(states.hidden_dir, f"{kind}-{i}", X) if isinstance(states, StoredStates) else X.cpu()

        rows, weights = ({e: t.cpu() for e, t in each.items()} for each in (self.rows, self.weights))
        X_o = None if self.X_o is None else keep(self.X_o, "experts-original")
        return _Kept(keep(self.X, "experts"), X_o, rows, weights)


@dataclass(frozen=True)
class _Layer:
    """What all experts of a block saw, at one place: before their first linears or before their last one."""

    H: Tensor
    H_val: Tensor
    borrowed: list[float]  # λ of each expert
    borrowed_val: list[float]  # the same for held-out text


class ExpertStatistics:
    """The statistics of each expert of a block. Making it runs the block over the text once.

    Args:
        groups: those of the experts of one module.
        last: the original model runs for the last time, and its hidden states become the block's outputs.
        kind: `routed`; for comparisons `layer` (H of all experts for each) or `all-tokens` (each gets every token).
    """

    def __init__(self, block: Block, groups: list[Group], clock: Clock, last: bool, kind: str = "routed") -> None:
        assert groups[0].expert is not None
        name = groups[0].expert.module
        self._block, self._module, self._clock, self._kind = block, block.module.get_submodule(name), clock, kind
        layout = layout_of(self._module)
        assert layout is not None
        self._layout: Layout = layout
        self._text: list[_Kept] = []
        sums = _LayerSums(block, name, layout)
        with block.many_runs():
            for share in block.shares:
                for i in share.batches:
                    batch = self._run(name, i, last)
                    with clock("statistics"), block.autocast(), torch.no_grad():
                        sums.add(batch, self._module, share.held_out)
                    self._text.append(batch.kept(i, block.hidden))
                with clock("statistics"):
                    sums.sums.fold(share)
        if last:
            block.forget_original()
        with clock("statistics"):
            self._before, self._after = sums.finish()
        self._rows: list[_Rows] = []  # of the expert whose turn it is
        self._inner_o: list[Tensor | None] = []  # what entered its last linear in the original model

    def _run(self, name: str, i: int, last: bool) -> _Batch:
        """Return what enters the experts for micro-batch i."""
        inputs, originals = run_both(self._block, i, {name}, self._clock, last)
        entering: Routed = inputs[name]
        X_o = _same_rows(entering, originals[name]) if name in originals else None
        if self._kind == "all-tokens":
            everyone = torch.arange(self._layout.experts, device=entering.X.device).expand(len(entering.X), -1)
            entering = replace(entering, index=everyone, scores=None)
        return _Batch(entering.X, X_o, *_places(entering, self._layout.experts))

    @torch.no_grad()
    def of(self, group: Group) -> InputStatistics:
        """Return the statistics of a group. The first linears of an expert must come before its last one."""
        assert group.expert is not None
        is_last = group.linears[0].endswith(DOWN)
        if is_last:
            with self._clock("forward"), self._block.autocast():
                rows = [
                    replace(rows, X=activated(self._module, group.expert.number, rows.X), X_o=X_o)
                    for rows, X_o in zip(self._rows, self._inner_o, strict=True)
                ]
        else:
            rows = self._enter(group.expert.number)
        with self._clock("statistics"):
            own = self._summed(group, rows)
            layer, number = self._after if is_last else self._before, group.expert.number
            if self._kind == "routed":
                return _shrunk(own, layer, layer.borrowed[number], layer.borrowed_val[number])
            return replace(own, H=layer.H, H_val=layer.H_val, borrowed=1.0) if self._kind == "layer" else own

    def _enter(self, expert: int) -> list[_Rows]:
        """Take the rows of an expert, and run it as it is in the original model."""
        self._rows, texts = [], iter(self._text)
        for share in self._block.shares:
            of_share = [batch.rows_of(expert) for batch in islice(texts, len(share.batches))]
            self._rows.append(_Rows.together(of_share, self._before.H.shape[0]).to(self._block.compute.device))
        with self._clock("forward"), self._block.autocast():
            self._inner_o = [None if r.X_o is None else activated(self._module, expert, r.X_o) for r in self._rows]
        return self._rows

    def _summed(self, group: Group, rows: list[_Rows]) -> InputStatistics:
        sums = GroupSums(group, self._block)
        for share, each in zip(self._block.shares, rows, strict=True):
            if len(each.X):
                differences = [] if each.X_o is None else [each.X_o - each.X]
                sums.add_rows([each.X, *differences], share.held_out, each.weights)
            sums.sums.fold(share)
        return sums.finish()


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


def _shrunk(own: InputStatistics, layer: _Layer, borrowed: float, borrowed_val: float) -> InputStatistics:
    """Return the statistics of an expert, shrunk towards those of all experts."""
    H_val = (
        layer.H_val if own.H_val is own.H else own.H_val.mul_(1 - borrowed_val).add_(layer.H_val, alpha=borrowed_val)
    )
    H = own.H.mul_(1 - borrowed).add_(layer.H, alpha=borrowed)
    if own.target_moment is not None:
        own.target_moment.mul_(1 - borrowed)
    if own.target_moment_val is not None:
        own.target_moment_val.mul_(1 - borrowed_val)
    return replace(own, H=H, H_val=H_val, borrowed=borrowed)


class _LayerSums:
    """Sums over all experts, at both places, and over a few channels for each expert."""

    def __init__(self, block: Block, name: str, layout: Layout) -> None:
        self.ranks, self.layout = block.ranks, layout
        last = linear_of(block.module, f"{name}.0.{DOWN}")
        self.widths = (last.out_features, last.in_features)
        self.channels = [_spread(width).to(block.compute.device) for width in self.widths]
        shapes = {f"H{place}": (width, width) for place, width in enumerate(self.widths)}
        shapes |= {f"few{i}": (layout.experts, len(few), len(few)) for i, few in enumerate(self.channels)}
        self.shapes = shapes
        self.device = block.compute.device
        self.sums = ShareSums(shapes, block.ranks, block.compute.device)
        self.tokens = {kind: [0] * layout.experts for kind in (False, True)}
        self.weights = {kind: [[] for _ in range(layout.experts)] for kind in (False, True)}

    def add(self, batch: _Batch, module: torch.nn.Module, held_out: bool) -> None:
        """Add a micro-batch."""
        inner, of_row = list[Tensor](), torch.zeros(len(batch.X), device=self.device)
        for expert, rows in batch.rows.items():
            X, weight = batch.X[rows], batch.weights[expert]
            A = activated(module, expert, X)
            for i, values in enumerate((X, A)):
                few = values[:, self.channels[i]].float() * weight.sqrt()[:, None]
                self.sums.growing(f"few{i}")[expert].addmm_(few.T, few)
            self.tokens[held_out][expert] += len(X)
            self.weights[held_out][expert].append(float(weight.sum(dtype=torch.float64)))
            of_row.index_add_(0, rows, weight)
            inner.append(A.float() * weight.sqrt()[:, None])
        add_lower(self.sums.growing("H0"), batch.X.float() * of_row.sqrt()[:, None])
        if inner:
            add_lower(self.sums.growing("H1"), torch.cat(inner))

    def finish(self) -> tuple[_Layer, _Layer]:
        """Return what is known of both places, in every process."""
        totals = self.sums.finish()
        parts = self.ranks.each((self.tokens, self.weights))

        def total(name: str, held_out: bool) -> Tensor:
            found = totals.pop((name, held_out), None)
            found = torch.zeros(self.shapes[name], device=self.device) if found is None else found
            return self.ranks.share(found)

        def of_experts(held_out: bool) -> tuple[Tensor, Tensor]:
            """Return the tokens and the weight of each expert."""
            tokens = [sum(n[held_out][e] for n, _ in parts) for e in range(self.layout.experts)]
            weights = [fsum(w for _, ws in parts for w in ws[held_out][e]) for e in range(self.layout.experts)]
            return torch.tensor(tokens, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)

        (n, w), (v, w_val) = of_experts(False), of_experts(True)
        layers = list[_Layer]()
        for place in (0, 1):
            H = mirrored(total(f"H{place}", False)).div_(float(w.sum()) or 1.0)
            H_val = mirrored(total(f"H{place}", True)).div_(float(w_val.sum()) or 1.0) if w_val.any() else H
            few, few_val = (total(f"few{place}", kind).cpu().double() for kind in (False, True))
            parts_of = self.channels[place]
            common, common_val = (M[parts_of][:, parts_of].cpu().double() for M in (H, H_val))
            of_each, of_each_val = (
                few / w.clamp(min=1e-300)[:, None, None],
                few_val / w_val.clamp(min=1e-300)[:, None, None],
            )
            borrowed = _borrowed(of_each, n, of_each_val, v, common, common_val)
            layers.append(_Layer(H, H_val, *borrowed))
        return layers[0], layers[1]


def _borrowed(
    own: Float[Tensor, "E m m"],
    n: Float[Tensor, "E"],
    own_val: Float[Tensor, "E m m"],
    v: Float[Tensor, "E"],
    layer: Float[Tensor, "m m"],
    layer_val: Float[Tensor, "m m"],
) -> tuple[list[float], list[float]]:
    """Return λ of each expert, and the same for its held-out moments. n, v: its tokens."""
    size = layer.diagonal().clamp(min=0).sqrt()
    by = torch.where(size > 0, 1 / size, 0.0)
    own, own_val, layer, layer_val = (M * by[:, None] * by for M in (own, own_val, layer, layer_val))
    away, away_val = own - layer, own_val - layer_val

    def part_of_noise(tokens: Tensor) -> Tensor:
        """Return r: the expert's own tokens are among those of the layer."""
        return 1 / tokens.clamp(min=1) - 1 / tokens.sum().clamp(min=1)

    known = (v > 0) & (n > 0) & (n < n.sum())
    if known.any():
        c = float((((own - own_val) * away).sum((1, 2)) / part_of_noise(n))[known].mean().clamp(min=0))
    else:  # nothing is held out: the noise of independent normal tokens
        c = float(layer.square().sum() + layer.diagonal().sum() ** 2)

    def share(tokens: Tensor, distance: Tensor) -> list[float]:
        share = (c * part_of_noise(tokens) / distance.clamp(min=1e-300)).clamp(0, 1)
        return torch.where(tokens > 0, share, 1.0).tolist()

    return share(n, away.square().sum((1, 2))), share(v, away_val.square().sum((1, 2)))


def _spread(width: int) -> Tensor:
    """Return channels that stand for all, evenly spread."""
    return torch.linspace(0, width - 1, min(width, _CHANNELS)).round().long()
