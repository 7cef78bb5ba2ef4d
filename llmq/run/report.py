"""Tells what a run did: to the user, in a table at the end, and to tools, in llmq_report.json."""

import dataclasses
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmq.algorithms.problem import Solution
from llmq.calibration.input_statistics import InputStatistics
from llmq.core.command_line import command_line
from llmq.core.config import VERSION, QuantizeConfig
from llmq.core.memory import PeakMemory, gpu_peak
from llmq.core.timing import Clock
from llmq.models.block_structure import Group
from llmq.models.experts import DOWN
from llmq.models.packed_share import PackedShare
from llmq.run.journal import Line, Pair
from llmq.verification.stated_share import SHARE

_WORST = 5  # layers and notes that are shown
_GPU_PEAK = "gpu_peak_bytes"


class Report:
    """Collects an entry for each group of linears, and a note on everything that is done otherwise than asked.

    Args:
        clock: the clock of the run; its seconds go into the report.
        tell: called with each entry once it is final.
    """

    def __init__(self, config: QuantizeConfig, clock: Clock, tell: Callable[[Line], None] = lambda _: None) -> None:
        self.config, self.clock, self.tell = config, clock, tell
        self.memory = PeakMemory()
        self.groups: list[Line] = []  # one entry for each group of linears
        self.notes: list[dict[str, str]] = []  # what was done otherwise than asked, and where
        self.drifts: dict[str, float] = {}
        """By block: how far its inputs are from the original model's, as a share, on held-out tokens."""
        self.refined: dict[str, Pair] = {}
        """By block: the objective of `--method tuned` on held-out tokens, before and after its training."""
        self.distilled: Pair | None = None
        """KL to the original model on held-out tokens, before and after training from end to end."""
        self.budget: Line | None = None
        """What a budget chose, and the KL that it predicts; `measured_kl` on held-out tokens once that is known."""
        self.packed = PackedShare()  # of the chosen blocks
        self.resumed: list[str] = []  # the last finished step of each process that was interrupted

    def note(self, where: str, notes: list[str]) -> None:
        """Add notes on what is done otherwise than asked. `where`: a block, a layer, or `model`."""
        self.notes += [{"where": where, "note": note} for note in notes]

    def group(
        self, block: str, group: Group, errors: Pair, solution: Solution, statistics: InputStatistics | None
    ) -> Line:
        """Return the entry of a group, and note its fallbacks.

        `errors`: relative output error of the method, and of plain rounding to nearest.
        """
        linears = group.linears
        entry: Line = {"block": block, "linears": list(linears), "error": errors[0], "rtn_error": errors[1]}
        entry |= {"damping": solution.damping, "matched": solution.matched, "kept": solution.kept}
        fallbacks = list(solution.fallbacks)
        if statistics is not None:
            entry |= {"tokens": statistics.tokens, "dropped_rows": statistics.dropped}
            if group.expert is not None:
                entry |= {"expert": group.expert.number, "borrowed": statistics.borrowed}
            if group.expert is not None and not statistics.tokens and not linears[0].endswith(DOWN):  # once an expert
                fallbacks.append("no token was routed to this expert: it is rounded for the tokens of all experts")
            if statistics.dropped:
                fallbacks.append(f"{statistics.dropped} token rows with NaN or infinity left out")
        self.note(f"{block}.{_short(linears)}", fallbacks)
        return entry

    def add(self, entry: Line) -> None:
        """Add an entry that is final."""
        peak = gpu_peak()
        on_gpu = {} if peak is None else {_GPU_PEAK: peak}
        self.groups.append(entry | {"at": self.clock.total, "peak_memory_bytes": self.memory.take()} | on_gpu)
        self.tell(self.groups[-1])

    @property
    def peak_memory(self) -> int:
        """Return the peak memory in bytes, of this process and of those that it resumed."""
        return max([self.memory.largest, *(entry["peak_memory_bytes"] for entry in self.groups)])

    @property
    def gpu_peak(self) -> int | None:
        """Return the most bytes that tensors took on the GPU, in this process or one that it resumed; None: no GPU."""
        earlier = [entry[_GPU_PEAK] for entry in self.groups if _GPU_PEAK in entry]
        return max([*earlier, gpu_peak() or 0]) or None

    def to_json(self) -> Line:
        """Return the whole report, ready for json.dump.

        `seconds` are split by phase. `error` is measured on held-out tokens, before any training from end to end.
        """
        return {
            **heading(self.config),
            "seconds": {"total": self.clock.total, **self.clock.seconds},
            "peak_memory_bytes": self.peak_memory,
            **({} if self.gpu_peak is None else {_GPU_PEAK: self.gpu_peak}),
            "packed_share": self.packed.share,
            "in_float": self.packed.in_float,
            SHARE: str(self.packed),
            "resumed": self.resumed,
            "notes": self.notes,
            "drifts": self.drifts,
            "refined": self.refined,
            "distilled": self.distilled,
            "budget": self.budget,
            "groups": self.groups,
        }

    def show(self, output: Path) -> None:
        """Print a summary on stderr: the worst layers, the notes, the time."""
        say = partial(print, file=sys.stderr)
        what = "held-out output error" if self.groups and self.groups[0].get("tokens") else "weight error"
        say(f"\nworst layers by relative {what}:")
        say(f"  {'layer':<58} {self.config.method:>9} {'rtn':>9}")
        for entry in sorted(self.groups, key=lambda e: -e["error"])[:_WORST]:
            leaves = _short(entry["linears"])
            say(f"  {entry['block'] + ' ' + leaves:<58} {entry['error']:>9.2e} {entry['rtn_error']:>9.2e}")
        for entry in self.notes[:_WORST]:
            say(f"note: {entry['where']}: {entry['note']}")
        if len(self.notes) > _WORST:
            say(f"… and {len(self.notes) - _WORST} more notes in the report")
        if self.distilled is not None:
            say("KL to the original on held-out text {:.4f}, after training {:.4f}".format(*self.distilled))
        if self.budget is not None:
            say(_budget(self.budget))
        if experts := _experts(self.groups):
            say(experts)
        say(self.packed)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.clock.seconds.items())
        on_gpu = "" if self.gpu_peak is None else f", {self.gpu_peak / 1e9:.2f} GB on the GPU"
        say(f"{self.clock.total:.1f} s ({phases}); peak memory {self.peak_memory / 1e9:.2f} GB{on_gpu}")
        say(f"wrote {output}")


def _short(linears: Sequence[str]) -> str:
    """Return the last names of the linears of a group; of an expert also its number."""
    *_, before, _ = f"..{linears[0]}".split(".")
    number = f"{before}." if before.isdigit() else ""
    return number + "+".join(name.rpartition(".")[2] for name in linears)


def _budget(budget: Line) -> str:
    """Return a sentence on what a budget brought."""
    measured = budget.get("measured_kl")
    found = "" if measured is None else f", measured {measured:.4f} on held-out text"
    return f"{budget['stored_bits']:.3f} stored bits per weight; KL predicted {budget['predicted_kl']:.4f}{found}"


def _experts(groups: list[Line]) -> str:
    """Return a sentence on the tokens of each expert, or nothing if there are no experts."""
    seen = {(entry["block"], entry["expert"]): entry["tokens"] for entry in groups if "expert" in entry}
    if not seen:
        return ""
    counts = sorted(seen.values())
    few = f"tokens per expert: {counts[0]} to {counts[-1]}, half of them above {counts[len(counts) // 2]}"
    unseen = counts.count(0)
    return few + (f"; {unseen} of {len(counts)} experts saw none" if unseen else "")


def heading(config: Any) -> Line:
    """Return what every report begins with: who did what, where, as a dataclass of settings says."""
    return {
        "llmq": VERSION,
        "command": command_line(),
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "versions": versions(),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return {name: version(name) for name in ("torch", "transformers", "safetensors")}
