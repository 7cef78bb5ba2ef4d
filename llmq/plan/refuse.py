"""What a plan says cannot be done here."""

from __future__ import annotations

from llmq.errors import RequestError
from llmq.plan.memory import END_TO_END, Moment
from llmq.plan.plan import Plan
from llmq.plan.words import gb


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
