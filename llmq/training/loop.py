"""The training loop: Adam, a rate that falls to zero, and the state with the least loss on held-out text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

_CHECKS = 5  # measurements of the held-out loss, or a few more
_State = TypeVar("_State")


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
    task: Task[_State], steps: int, batch: int, start: _State, progress: bool = False
) -> tuple[_State, tuple[float, float]]:
    """Return the state with the least held-out loss, which may be `start`, and that loss before and after."""

    def held_out() -> float:
        with torch.no_grad():
            return task.held_out()

    before = least = held_out()
    best = start
    groups = [{"params": parameters, "lr": rate} for parameters, rate in task.parameters if rate > 0]
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    bar = tqdm(batches(task.samples, batch, steps), "training", total=steps, disable=not progress, unit="step")
    for step, indices in enumerate(bar, start=1):
        with torch.enable_grad():
            loss = task.loss(indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {float(loss.detach()):.4f}, held out {least:.4f}", refresh=False)
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            now = held_out()
            if now < least:
                best, least = task.state(), now
    return best, (before, least)


def batches(count: int, size: int, steps: int) -> Iterator[list[int]]:
    """Yield for each step `size` indices of `count` samples. They are shuffled again when less than a batch is left."""
    order, waiting = torch.Generator().manual_seed(0), []
    size = min(size, count)
    for _ in range(steps):
        if len(waiting) < size:
            waiting = torch.randperm(count, generator=order).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
