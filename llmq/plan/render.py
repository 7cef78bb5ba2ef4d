"""Prints a plan, and refuses a run that does not fit."""

from collections.abc import Iterator

from llmq.core.errors import RequestError
from llmq.models.block_structure import Group
from llmq.plan.block_shapes import Layout, block_ranges, counted
from llmq.plan.memory_model import END_TO_END, Moment
from llmq.plan.plan import Plan


def lines(plan: Plan) -> Iterator[str]:
    """Yield the plan as lines of text."""
    packed, nbytes = plan.packed
    yield f"model     {plan.model}, {plan.weight_count / 1e6:,.1f} million weights"
    chosen = [name for layout in plan.layouts for name in layout.blocks]
    yield f"blocks    {len(plan.blocks)} in the model; {len(chosen)} are quantized: {block_ranges(plan.blocks, chosen)}"
    for layout in plan.layouts:
        yield f"          each of {block_ranges(plan.blocks, layout.blocks)}:"
        yield from counted(f"            {_group(plan, layout, group)}" for group in layout.groups)
    for i, line in enumerate(plan.in_float):
        yield f"{'' if i else 'in float':<10}{line}"
    yield f"share     {plan.share}"
    yield f"format    {plan.stored_as}"
    whole = 8 * plan.output / plan.weight_count
    yield f"bits      {8 * nbytes / max(1, packed):.2f} for each packed weight, {whole:.2f} over the whole model"
    yield f"output    {gb(plan.output)}"
    yield f"text      {plan.text}"
    yield from _needs(plan)
    if plan.seconds:
        works = ", ".join(f"{work} {_time(seconds)}" for work, seconds in plan.seconds.items() if seconds >= 1)
        yield f"time      about {_time(sum(plan.seconds.values()))} ({works or 'less than a second each'})"
        busy = "; other programs are busy" if plan.busy else ""
        yield f"          estimated in {plan.probe:.1f} s, by timing each kind of block with random weights{busy}"


def _group(plan: Plan, layout: Layout, group: Group) -> str:
    shapes = [f"{name} {'x'.join(map(str, layout.shapes[name]))}" for name in group.linears]
    return f"{' + '.join(shapes)}, {plan.bits[f'{layout.blocks[0]}.{group.linears[0]}']} bit"


def _needs(plan: Plan) -> Iterator[str]:
    """Yield the lines about memory and disk."""
    each = " in each process" if plan.processes[0] > 1 else ""
    where = "in memory" if plan.states.directory is None else f"on disk, in {plan.states.directory.parent}"
    where = f"on the {plan.device} device" if plan.states.resident else where
    experts = f", and {gb(plan.states.experts)} of inputs of experts" if plan.states.experts else ""
    yield f"states    {gb(plan.states.nbytes)} of hidden states{experts}{each} wait {where}"
    peak, (host, device) = plan.program + plan.host_bytes(plan.worst), plan.free
    yield f"memory    {gb(peak)} at most{each}, for {plan.worst.what}; {gb(host)} are free"
    if plan.device != "cpu":
        worst = plan.worst_on_device
        there = f"at most on the {plan.device} device, for {worst.what}"
        yield f"          {gb(worst.device)} {there}; {gb(device)} are free"
    for disk in plan.disks:
        yield f"disk      {gb(disk.needed)} for {disk.what} in {disk.path}; {gb(disk.free)} are free"


def gb(size: int) -> str:
    """Return a number of bytes as GB, or as MB if it is less than one GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def check_plan(plan: Plan) -> None:
    """Raise RequestError if the plan needs more disk or memory than is free."""
    for disk in plan.disks:
        if disk.needed > disk.free:
            states = disk.what == "hidden states"
            way = "choose another --offload-dir, or fewer --samples" if states else "choose another --output"
            raise RequestError(
                f"not enough disk space in {disk.path}: {disk.what} will take {gb(disk.needed)}, "
                f"but {gb(disk.free)} are free.\nMake room, or {way}."
            )
    (host, device), local = plan.free, plan.processes[1]
    less = "use fewer --samples, or a machine with more memory"
    worst, needed = plan.worst, local * plan.host_bytes(plan.worst)
    if needed > host:
        states = local * (plan.states.nbytes + plan.states.experts) * (plan.states.directory is None)
        way = f"use --offload-dir: it keeps {gb(states)} of hidden states on disk" if states > needed - host else less
        processes = f" for {local} processes" if local > 1 else ""
        raise RequestError(
            f"{worst.what} will take {gb(needed)} of memory{processes}, but {gb(host)} are free.\n"
            f"Close other programs, or {_less_training(worst) or way}."
        )
    if plan.device != "cpu" and plan.worst_on_device.device > device:
        worst = plan.worst_on_device
        raise RequestError(
            f"{worst.what} will take {gb(worst.device)} of the {plan.device} device, but {gb(device)} are free.\n"
            f"Use --device cpu, whose memory may be larger, or {_less_training(worst) or less}."
        )


def _less_training(moment: Moment) -> str:
    way = "use --tuned.end-rate 0; --tuned.end-steps 0 --tuned.steps 100 trains one block after the other"
    return way if moment.what == END_TO_END else ""
