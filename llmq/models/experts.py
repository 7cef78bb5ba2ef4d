"""Experts as linears: a module that holds all experts in one 3-D tensor becomes one that holds three linears for each.

    experts.gate_up_proj [E, 2 i, h]         experts.{0 … E-1}.gate_proj, up_proj   nn.Linear(h, i)
    experts.down_proj    [E, h, i]     ──►   experts.{0 … E-1}.down_proj            nn.Linear(i, h)

The tensors move, the numbers stay: the module returns what transformers' own (`grouped_mm`) does. The model is on the
meta device when this happens, so nothing is copied; `models/model_files.py` reads each linear from the files.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
_LAYOUT = "llmq_layout"  # attribute of a module whose experts are linears


@dataclass(frozen=True)
class Place:
    """Where the weight or bias of one kind of linear lies in the parameter that holds it for all experts."""

    parameter: str  # its name inside the experts module: [E, …], or [E · inner, …]
    part: slice = field(
        default_factory=lambda: slice(None)
    )  # the outputs of this linear; gate and up share a parameter
    turned: bool = False  # inputs come first

    def of(self, whole: Tensor, expert: int, experts: int) -> Tensor:
        """Return the weight [out, in] or bias [out] of one expert, as a view."""
        own = whole.view(experts, -1, *whole.shape[1:])[expert] if whole.ndim == 2 and self.is_flat else whole[expert]
        return (own.T if self.turned else own)[self.part]

    @property
    def is_flat(self) -> bool:
        """Return whether the parameter has two dimensions although it is a weight (DBRX)."""
        return self.parameter.startswith("mlp.")


@dataclass(frozen=True)
class Layout:
    """How a module held its experts before they became linears."""

    experts: int
    places: dict[str, Place]  # by the name inside one expert: gate_proj.weight, …
    interleaved: bool = False  # gate and up take turns in the input of `_apply_gate`
    scored: bool = False  # every expert gets all tokens, times their scores: 0 for most (Llama 4)
    passes: bool = False  # an expert that does not exist returns its input (LongCat)
    wholes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """The shapes of the parameters that held all experts."""

    def sharing(self, place: Place) -> list[str]:
        """Return the names inside one expert that lie in the same parameter."""
        return [name for name, other in self.places.items() if other.parameter == place.parameter]


class Expert(nn.Module):
    """The linears of one expert."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


@dataclass(frozen=True)
class Routed:
    """Which rows go to which experts: what enters an experts module once."""

    X: Float[Tensor, "rows in"]
    index: Int64[Tensor, "rows k"]  # the experts of each row; one that does not exist stands for none
    scores: Float[Tensor, "rows k"] | None  # what the experts' outputs are multiplied by
    token: Int64[Tensor, "rows"]  # where each row comes from

    def by_expert(self, experts: int) -> Iterator[tuple[int, Int64[Tensor, "n"]]]:
        """Yield each expert that has rows, with the places of its rows in the flattened `index`, in order."""
        flat = self.index.flatten()
        order, counts = torch.argsort(flat, stable=True), torch.bincount(flat.clamp(0, experts), minlength=experts)
        for expert, places in enumerate(order.split(counts.tolist())[:experts]):
            if len(places):
                yield expert, places


def experts_to_linears(model: Any, names: Container[str] | None = None) -> None:
    """Turn the experts of a model into linears on the meta device.

    `names`: only modules that contain one of these linears, by its name in the model; None: all.
    """
    for name, module in list(model.named_modules()):
        layout = _layout_of(module)
        if layout is None or layout.experts == 0:
            continue
        if names is None or any(f"{name}.0.{inner.rpartition('.')[0]}" in names for inner in layout.places):
            parameters = {place.parameter for place in layout.places.values()}
            wholes = {parameter: tuple(module.get_parameter(parameter).shape) for parameter in parameters}
            _unpack(module, replace(layout, wholes=wholes))


def expert_linears(model: Any) -> int:
    """Return how many linears `experts_to_linears` would make."""
    found = filter(None, map(_layout_of, model.modules()))
    return sum(layout.experts * len(linears_of(layout)) for layout in found)


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Return the layout of each module whose experts are linears, by its name in the model."""
    found = ((name, layout_of(module)) for name, module in model.named_modules())
    return {name: layout for name, layout in found if layout is not None}


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a module whose experts are linears; None for any other module."""
    return module.__dict__.get(_LAYOUT)


def linears_of(layout: Layout) -> list[str]:
    """Return the names of the linears inside one expert: those before the activation, then the one after it."""
    return [name.removesuffix(".weight") for name in layout.places if name.endswith(".weight")]


def _layout_of(module: Any) -> Layout | None:
    """Return how a module of transformers holds its experts; None if it has none, or holds them in another way."""
    kind = type(module).__name__
    if kind == "DbrxExperts":
        of_mlp = {GATE: Place("mlp.w1"), UP: Place("mlp.v1"), DOWN: Place("mlp.w2", turned=True)}
        return Layout(module.num_experts, {f"{name}.weight": place for name, place in of_mlp.items()})
    parameters: dict[str, Any] = dict(module.named_parameters(recurse=False))
    if kind == "Llama4TextExperts":
        turned, interleaved, gated = True, False, True
    elif kind == "LongcatFlashExperts" and DOWN in parameters:
        turned, interleaved, gated = False, False, True
    elif hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated") and DOWN in parameters:
        turned, interleaved, gated = module.is_transposed, not module.is_concatenated, module.has_gate
    else:
        return None
    first, experts = ("gate_up_proj" if gated else UP), len(parameters[DOWN])
    outputs = parameters[first].shape[2 if turned else 1]
    half = outputs // 2
    parts = {GATE: slice(0, half), UP: slice(half, outputs)} if gated else {UP: slice(None)}
    if interleaved:
        parts = {GATE: slice(0, None, 2), UP: slice(1, None, 2)}
    places = {f"{name}.weight": Place(first, part, turned) for name, part in parts.items()}
    places[f"{DOWN}.weight"] = Place(DOWN, turned=turned)
    if f"{first}_bias" in parameters:
        places |= {f"{name}.bias": Place(f"{first}_bias", part) for name, part in parts.items()}
        places[f"{DOWN}.bias"] = Place(f"{DOWN}_bias")
    return Layout(experts, places, interleaved, kind == "Llama4TextExperts", kind == "LongcatFlashExperts")


def _unpack(module: Any, layout: Layout) -> None:
    """Put linears without numbers in the place of the parameters that hold all experts."""
    shapes = {
        name: place.of(module.get_parameter(place.parameter).to("meta"), 0, layout.experts).shape
        for name, place in layout.places.items()
    }
    for parameter in {place.parameter for place in layout.places.values()}:
        inside, _, leaf = parameter.rpartition(".")
        holder: Any = module.get_submodule(inside)
        delattr(holder, leaf)
        holder._is_hf_initialized = True  # transformers would look for the parameters
    tensors = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    for expert in range(layout.experts):
        linears = Expert()
        for name in linears_of(layout):
            linears.add_module(name, _linear_on_meta(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")))
        module.add_module(str(expert), linears)
    module.__dict__[_LAYOUT] = layout
    module.forward = partial(run_experts, module)


def _linear_on_meta(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear with parameters of these shapes, in half the time of `nn.Linear(…)` or a deep copy of one.

    DeepSeek-V3's 45 000 take 3.3 s instead of 6.6 or 7.1 (experts_to_linears, 2-core AVX2 machine, 2026-11-28).
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return linear


def expert_of(module: nn.Module, expert: int) -> Expert:
    """Return the linears of one expert."""
    linears = module.get_submodule(str(expert))
    assert isinstance(linears, Expert)
    return linears


def routed(module: nn.Module, args: tuple[Any, ...]) -> Routed:
    """Return what enters an experts module, given the arguments of its forward."""
    layout = layout_of(module)
    assert layout is not None
    if layout.scored:
        X = args[0].view(layout.experts, -1, args[0].shape[-1])
        expert, token = torch.nonzero(X.any(-1), as_tuple=True)
        return Routed(X[expert, token], expert[:, None], None, token)
    X, index, scores = args[0].flatten(0, -2), *args[1:]
    return Routed(X, index, scores, torch.arange(len(X), device=X.device))


def activated(module: Any, expert: int, X: Float[Tensor, "n in"]) -> Float[Tensor, "n inner"]:
    """Return what enters the down projection of one expert."""
    linears, layout = expert_of(module, expert), layout_of(module)
    assert layout is not None
    up = linears.up_proj(X)
    if f"{GATE}.weight" not in layout.places:
        return module.act_fn(up)
    return gated(module, linears.gate_proj(X), up)


def gated(module: Any, gate: Float[Tensor, "n inner"], up: Float[Tensor, "n inner"]) -> Float[Tensor, "n inner"]:
    """Return the product of up and the activation of gate, or what else the module makes of them."""
    layout = layout_of(module)
    assert layout is not None
    if hasattr(module, "_apply_gate"):
        both = torch.stack([gate, up], -1).flatten(-2) if layout.interleaved else torch.cat([gate, up], -1)
        return module._apply_gate(both)
    act = module.act_fn if hasattr(module, "act_fn") else module.mlp.activation_fn
    return act(gate) * up


def run_experts(module: Any, *args: Any) -> Tensor:
    """Run each expert that has rows; the order of the sums is that of transformers' grouped_mm."""
    layout, entering = layout_of(module), routed(module, args)
    assert layout is not None
    (rows, k), width = entering.index.shape, entering.X.shape[-1]
    outputs = entering.X.new_zeros(rows * k, width)
    if layout.passes:
        none = torch.nonzero(entering.index.flatten() >= layout.experts).flatten()
        outputs[none] = entering.X[none // k]
    for expert, places in entering.by_expert(layout.experts):
        inner = activated(module, expert, entering.X[places // k])
        outputs[places] = finished(module, expert_of(module, expert).down_proj(inner)).to(outputs.dtype)
    outputs = outputs.view(rows, k, width)
    return summed(layout, args, entering, outputs if entering.scores is None else outputs * entering.scores[..., None])


def summed(layout: Layout, args: tuple[Any, ...], entering: Routed, outputs: Float[Tensor, "rows k out"]) -> Tensor:
    """Return what the module returns, given the outputs of each row's experts, times the scores."""
    if layout.scored:
        whole = args[0].new_zeros(layout.experts, len(args[0]) // layout.experts, outputs.shape[-1])
        whole[entering.index[:, 0], entering.token] = outputs[:, 0]
        return whole.view_as(args[0])
    return outputs.sum(1).to(args[0].dtype).view_as(args[0])


def finished(module: Any, output: Float[Tensor, "*n out"]) -> Float[Tensor, "*n out"]:
    """Return what an expert returns, given the output of its down projection."""
    return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output
