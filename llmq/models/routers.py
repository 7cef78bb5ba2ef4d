"""Finds routers: what chooses the experts of a token. They are small, and stay in float."""

from torch import nn

_NAMES = {"gate", "router", "router_gate"}


def is_router(name: str, module: nn.Module) -> bool:
    """Return whether a module is a router, or the gate of a shared expert, without being a linear."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    is_named = name.rpartition(".")[2] in _NAMES or _is_called_so(module)
    return is_named and weight is not None and weight.ndim == 2 and not isinstance(module, nn.Linear)


def routing_linears(block: nn.Module) -> set[str]:
    """Return the names of the linears of a block that are routers, or parts of one (DBRX, ZAYA).

    A linear called `gate` whose outputs are as many as its inputs is none.
    """
    modules = dict(block.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if name and _is_called_so(module))
    found: set[str] = set()
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            is_small = module.out_features < module.in_features
            if f"{name}.".startswith(inside) or (is_small and _NAMES.intersection(name.split("."))):
                found.add(name)
    return found


def _is_called_so(module: nn.Module) -> bool:
    return "router" in type(module).__name__.lower()
