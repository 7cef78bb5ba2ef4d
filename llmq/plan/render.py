"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from llmq.core.errors import RequestError
from llmq.plan.block_shapes import numbers_of
from llmq.plan.memory_model import END_TO_END, Moment
from llmq.plan.plan import Plan


def lines(plan: Plan) -> Iterator[str]:
    """The plan as a person reads it."""
    packed, nbytes = plan.packed
    yield f"model     {plan.model}, {plan.numbers / 1e6:,.1f} million weights"
    chosen = [name for layout in plan.layouts for name in layout.blocks]
    yield f"blocks    {len(plan.blocks)}, of which {len(chosen)} are quantized: {numbers_of(plan.blocks, chosen)}"
    for layout in plan.layouts:
        yield f"          each of {numbers_of(plan.blocks, layout.blocks)}:"
        for group in layout.groups:
            shapes = [f"{name} {'x'.join(map(str, layout.shapes[name]))}" for name in group.linears]
            bits = plan.bits[f"{layout.blocks[0]}.{group.linears[0]}"]
            yield f"            {' + '.join(shapes)}, {bits} bit"
    for i, each in enumerate(plan.in_float):
        yield f"{'' if i else 'in float':<10}{each}"
    yield f"format    {plan.stored_as}"
    whole = 8 * plan.output / plan.numbers
    yield f"bits      {8 * nbytes / max(1, packed):.2f} for each packed weight, {whole:.2f} of the whole model"
    yield f"output    {gb(plan.output)}"
    yield f"text      {plan.text}"
    yield from _needs(plan)
    if plan.seconds:
        parts = ", ".join(f"{what} {_time(seconds)}" for what, seconds in plan.seconds.items() if seconds >= 1)
        yield f"time      about {_time(sum(plan.seconds.values()))} ({parts or 'moments'})"
        busy = "; other programs are at work, which makes it longer" if plan.busy else ""
        yield f"          estimated in {plan.probe:.1f} s from work on random numbers in a block of each kind{busy}"


def _needs(plan: Plan) -> Iterator[str]:
    """Memory and disk."""
    each = " for each of the processes" if plan.processes[0] > 1 else ""
    where = "in memory" if plan.states.directory is None else f"on disk, in {plan.states.directory.parent}"
    yield f"states    {gb(plan.states.nbytes)} of hidden states{each} wait {where}"
    peak, (host, device) = plan.program + plan.host_bytes(plan.worst), plan.free
    free = "" if host is None else f"; {gb(host)} are free"
    yield f"memory    {gb(peak)} at most{each}, for {plan.worst.what}{free}"
    if plan.device != "cpu":
        free = "" if device is None else f"; {gb(device)} are free"
        worst = plan.worst_on_device
        yield f"          {gb(worst.device)} at most on the {plan.device} device, for {worst.what}{free}"
    for disk in plan.disks:
        yield f"disk      {gb(disk.needed)} for {disk.what} in {disk.path}; {gb(disk.free)} are free"


def gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def check_plan(plan: Plan) -> None:
    """Raise RequestError if disks or memory do not suffice for what is planned."""
    for disk in plan.disks:
        if disk.needed > disk.free:
            states = disk.what == "hidden states"
            way = "name another --offload-dir, or fewer --samples" if states else "choose another --output"
            raise RequestError(
                f"{disk.what} need {gb(disk.needed)} in {disk.path}, but {gb(disk.free)} are free there.\n"
                f"Make room, or {way}."
            )
    (host, device), local, less = plan.free, plan.processes[1], "use fewer --samples, or a machine with more"
    worst, needed = plan.worst, local * plan.host_bytes(plan.worst)
    if host is not None and needed > host:
        states = local * plan.states.nbytes * (plan.states.directory is None)
        way = f"--offload-dir keeps {gb(states)} of hidden states on disk" if states > needed - host else less
        raise RequestError(
            f"{worst.what} will take {gb(needed)} of memory{_per(local)}, but {gb(host)} are free.\n"
            f"Close other programs; {_less_training(worst) or way}."
        )
    if plan.device != "cpu" and device is not None and plan.worst_on_device.device > device:
        worst = plan.worst_on_device
        raise RequestError(
            f"{worst.what} will take {gb(worst.device)} of the {plan.device} device, but {gb(device)} are free.\n"
            f"--device cpu has other memory; {_less_training(worst) or less}."
        )


def _less_training(moment: Moment) -> str:
    if moment.what != END_TO_END:
        return ""
    return "--tuned.end-rate 0 needs less; --tuned.end-steps 0 --tuned.steps 100 trains one block after the other"


def _per(processes: int) -> str:
    return f" for {processes} processes" if processes > 1 else ""
