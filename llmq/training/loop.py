"""The training loop: Adam, a rate that falls to zero, and the state with the least loss on held-out text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

_CHECKS = 5  # measurements of the held-out loss, or a few more
_State = TypeVar("_State")


@runtime_checkable
class Saved(Protocol):
    """Keeps the state of a training, from which an interrupted one goes on."""

    @property
    def is_due(self) -> bool:
        """Return whether the state should be kept again now."""
        ...

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Replace the state by this one."""

    def load(self) -> dict[str, Tensor]:
        """Return the state that was kept last; empty if there is none."""
        ...


@dataclass(frozen=True)
class Task(Generic[_State]):
    """What is trained, and how it is measured."""

    parameters: list[tuple[list[Tensor], float]]
    """Groups of parameters with their learning rates. Rate 0 leaves a group as it is."""
    samples: int
    loss: Callable[[list[int]], Tensor]  # returns the loss of a batch of sample indices, with gradients
    held_out: Callable[[], float]  # returns the loss on held-out text of the state as it would be stored
    state: Callable[[], _State]  # returns a copy of the state


def train(
    task: Task[_State], steps: int, batch: int, start: _State, progress: bool = False, saved: Saved | None = None
) -> tuple[_State, tuple[float, float]]:
    """Return the state with the least held-out loss, which may be `start`, and that loss before and after.

    `saved`: goes on from there, if it holds a state of this training. The result is the same as without the
    interruption. Only for a `_State` that is a mapping of tensors.
    """

    def held_out() -> float:
        with torch.no_grad():
            return task.held_out()

    learning = [(parameters, rate) for parameters, rate in task.parameters if rate > 0]
    optimizer = torch.optim.Adam([{"params": each, "lr": rate} for each, rate in learning], betas=(0.9, 0.95))
    best, kept = start, {} if saved is None else saved.load()
    if kept and _is_sound(kept, optimizer, steps, task.state()):
        done, (before, least), best = _restore(optimizer, kept, start)
    else:
        done, before = 0, held_out()
        least = before
    for parameter in _parameters(optimizer):
        parameter.requires_grad_()
    steps_left = islice(batches(task.samples, batch, steps), done, None)
    bar = tqdm(steps_left, "training", total=steps, initial=done, disable=not progress, unit="step")
    for step, indices in enumerate(bar, start=done + 1):
        for group, (_, rate) in zip(optimizer.param_groups, learning, strict=True):
            group["lr"] = rate * (1 - (step - 1) / steps)
        with torch.enable_grad():
            loss = task.loss(indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix_str(f"loss {float(loss.detach()):.4f}, held out {least:.4f}", refresh=False)
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            now = held_out()
            if now < least:
                best, least = task.state(), now
        if saved is not None and saved.is_due:
            saved.save(_kept(optimizer, step, (before, least), None if best is start else best))
    return best, (before, least)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _kept(optimizer: torch.optim.Optimizer, step: int, losses: tuple[float, float], best: Any) -> dict[str, Tensor]:
    """Return all that the steps after this one depend on. `best`: None if it is the start."""
    tensors = {"step": torch.tensor(step), "losses": torch.tensor(losses, dtype=torch.float64)}
    for i, parameter in enumerate(_parameters(optimizer)):
        tensors[f"parameter.{i}"] = parameter.detach()
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[parameter].items()}
    return tensors | {f"best.{name}": tensor for name, tensor in (best or {}).items()}


def _is_sound(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int, state: Any) -> bool:
    """Return whether these are tensors that `_kept` returned for the same training."""
    shapes: dict[str, torch.Size] = {"step": torch.Size(), "losses": torch.Size([2])}
    for i, parameter in enumerate(_parameters(optimizer)):
        shapes |= {f"{name}.{i}": parameter.shape for name in ("parameter", "exp_avg", "exp_avg_sq")}
        shapes[f"step.{i}"] = torch.Size()
    best = {f"best.{name}": tensor.shape for name, tensor in state.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    is_whole = found in (shapes, shapes | best) and all(bool(x.isfinite().all()) for x in tensors.values())
    return is_whole and 0 < int(tensors["step"]) <= steps


def _restore(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], start: Any
) -> tuple[int, tuple[float, float], Any]:
    """Set the parameters and Adam's moments; return the number of steps done, the losses, and the best state."""
    for i, parameter in enumerate(_parameters(optimizer)):
        parameter.data = tensors[f"parameter.{i}"].to(parameter.device)
        moments = {name: tensors[f"{name}.{i}"].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": tensors[f"step.{i}"], **moments}
    best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
    before, least = tensors["losses"].tolist()
    return int(tensors["step"]), (before, least), best or start


def batches(count: int, size: int, steps: int) -> Iterator[list[int]]:
    """Yield for each step `size` indices of `count` samples. They are shuffled again when less than a batch is left."""
    order, waiting = torch.Generator().manual_seed(0), []
    size = min(size, count)
    for _ in range(steps):
        if len(waiting) < size:
            waiting = torch.randperm(count, generator=order).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
