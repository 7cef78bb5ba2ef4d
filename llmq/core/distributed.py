"""Several processes that quantize one model together: who they are, and what they tell each other.

Started by `torchrun --nproc-per-node N -m llmq.quantize …` or `accelerate launch`, on one node or several. Calibration
batches and the rows of each solve are split over them; the first writes. What floating-point sums depend on never
depends on how many there are: see calibration/work_split.py.
"""

import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from llmq.core.device import cores
from llmq.core.errors import RequestError, WorkError, first_line

_T = TypeVar("_T")

# Longer than any process works alone while others wait for it. One that dies is noticed at once: its connections close.
_PATIENCE = timedelta(hours=4)
# What gloo and NCCL say of a connection whose other end is gone.
_CLOSED = re.compile("clos|reset|broken pipe|abort|timed out|connect|peer", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this is the process that writes."""
        return self.rank == 0

    def first(self, make: Callable[[], _T]) -> _T:
        """Call `make` in the first process only; return its result in all of them."""
        if self.size == 1:
            return make()
        box = [make() if self.is_first else None]
        with _as_work_error():
            distributed.broadcast_object_list(box, src=0)
        made: Any = box[0]
        return made

    def each(self, mine: _T) -> list[_T]:
        """Return the values `mine` of all processes, ordered by rank."""
        if self.size == 1:
            return [mine]
        box: list[Any] = [None] * self.size
        with _as_work_error():
            distributed.all_gather_object(box, mine)
        return box

    def share(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copy the tensor of the process `source` into the tensors of all others (same shape); return it."""
        if self.size > 1:
            with _as_work_error():
                distributed.broadcast(tensor, src=source)
        return tensor

    def meet(self) -> None:
        """Wait until all processes have reached this call."""
        self.each(None)

    def send(self, tensor: Tensor) -> Callable[[], None]:
        """Send a tensor to the first process. Returns a function that blocks until it is sent; keep it unchanged."""
        return _started(lambda: distributed.isend(tensor, dst=0))

    def receive(self, tensor: Tensor, source: int) -> Callable[[], None]:
        """Fill the tensor from `source` (first process only). Returns a function that blocks until it is filled."""
        return _started(lambda: distributed.irecv(tensor, src=source))

    def rows(self, count: int, together: int) -> list[slice]:
        """Return the rows of each process: `count` rows split as evenly as multiples of `together` allow."""
        bounds = [count // together * i // self.size * together for i in range(self.size)]
        return [slice(start, stop) for start, stop in pairwise([*bounds, count])]

    def joined(self, mine: Tensor, slices: Sequence[slice]) -> Tensor:
        """Return the rows of all processes; this one has only its own slice."""
        if self.size == 1:
            return mine
        whole = mine.new_empty((slices[-1].stop, *mine.shape[1:]))
        whole[slices[self.rank]] = mine
        for source, part in enumerate(slices):
            if part.stop > part.start:
                whole[part] = self.share(whole[part].contiguous(), source)
        return whole


ALONE = Ranks()


def local_rank() -> int:
    """Return the number of this process among those on this machine, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes() -> int:
    """Return how many processes the launcher has started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here(ranks: Ranks) -> int:
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))


@contextmanager
def joined_ranks(device: torch.device) -> Generator[Ranks]:
    """Connect the processes that a launcher started, if any; inside the context they can talk to each other.

    CPUs use gloo and split the machine's cores evenly. GPUs use NCCL, and gloo for what is in memory. Inside of another
    such context they are connected already: to connect anew would race with the old addresses.

    Raises RequestError if the environment speaks of several processes but does not say how they meet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise RequestError(
            f"WORLD_SIZE says {size} processes, but {', '.join(sorted(missing))} are not set; "
            "start them by torchrun, or unset WORLD_SIZE"
        )
    if distributed.is_initialized():
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
        return
    threads = torch.get_num_threads()
    if device.type == "cpu":  # torchrun leaves one thread to each, however many cores there are
        torch.set_num_threads(max(1, cores() // processes_here(Ranks(size=size))))
    else:
        torch.cuda.set_device(device)  # by which NCCL tells the processes apart
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise WorkError(f"the {size} processes cannot meet: {first_line(error)}") from None
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(threads)


def _started(begin: Callable[[], distributed.Work | None]) -> Callable[[], None]:
    """Start a transfer; return a function that blocks until it ends."""
    with _as_work_error():
        work = begin()

    def wait() -> None:
        with _as_work_error():
            if work is not None:
                work.wait()

    return wait


@contextmanager
def _as_work_error() -> Generator[None]:
    """Raise WorkError instead of torch's error, which only names the socket that was closed."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if _CLOSED.search(reason):
            raise WorkError(f"another process of this run ended; its own message says why ({reason})") from None
        raise WorkError(f"the processes cannot exchange data: {reason}") from None
