"""llmq_progress.jsonl: what a run has done, one JSON object a line. People watch it, and `--resume` continues from it.

    {"fingerprint": …}                       the first line: what the result depends on
    {"block": …, "linears": …, "error": …}   a group of linears, once it is solved
    {"finished": "model.layers.0", …}        a step whose tensors are on disk, with what later steps need to know of it
    …

A line is added only after the data it refers to is on disk. Lines after the last finished step do not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.core.errors import RequestError
from llmq.formats.scheme import Scheme

Line = dict[str, Any]
Pair = tuple[float, float]
_SCHEME = 5  # fields of a scheme that a line tells: a run never rounds inputs


@dataclass(frozen=True)
class FinishedStep:
    """What the steps after a finished one need to know of it: the line with the key `finished`."""

    name: str
    parts: int  # files that the writer has written since the run began
    digests: dict[str, str]
    schemes: dict[str, Scheme]
    notes: list[dict[str, str]]  # notes and the next three fields go into the report: see report.py
    drift: float | None
    refined: Pair | None
    distilled: Pair | None
    seconds: dict[str, float]  # since the run began, by phase, and `total`
    states: Line | None  # how to find the hidden states that leave the block; None if they are in memory
    measured_kl: float | None = None  # after the last block of a run with a budget

    def to_json(self) -> Line:
        """Return the line, ready for json.dumps."""
        schemes = {name: list(vars(scheme).values())[:_SCHEME] for name, scheme in self.schemes.items()}
        fields = vars(self) | {"schemes": schemes}
        if self.measured_kl is None:  # as in a run without a budget
            del fields["measured_kl"]
        return {"finished": fields.pop("name"), **fields}

    @classmethod
    def from_json(cls, line: Line) -> FinishedStep:
        """Return the step that a line tells of."""
        fields: Line = line | {"schemes": {name: Scheme(*values) for name, values in line["schemes"].items()}}
        for pair in ("refined", "distilled"):
            fields[pair] = line[pair] and tuple(line[pair])
        return cls(name=fields.pop("finished"), **fields)


@dataclass(frozen=True)
class Step:
    """The lines of a step that an earlier process finished: a block, or the tensors outside the blocks."""

    finished: Line  # see FinishedStep
    groups: list[Line] = field(default_factory=list)  # one for each of its groups of linears


class Journal:
    """Writes the journal. `path`: the file; None to write nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def begin(self, fingerprint: Mapping[str, Any], steps: Sequence[Step] = ()) -> None:
        """Replace the file by a new one with the steps that earlier processes finished.

        Raises OSError if it cannot be written.
        """
        if self._path is not None:
            lines = [line for step in steps for line in (*step.groups, step.finished)]
            new = self._path.with_name(self._path.name + ".partial")
            _write(new, "w", [{"fingerprint": fingerprint}, *lines])
            os.replace(new, self._path)

    def add(self, line: Line) -> None:
        """Add one line. When this returns, the line is safely on the disk."""
        if self._path is not None:
            _write(self._path, "a", [line])


def read_journal(path: Path) -> tuple[Line, list[Step]]:
    """Return the fingerprint and the finished steps of a journal; both are empty if there is no file.

    Raises RequestError if the file cannot be read.
    """
    fingerprint, steps, groups = Line(), list[Step](), list[Line]()
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # a last line without an end was cut off
        for line in map(json.loads, lines):
            if not isinstance(line, dict):
                raise ValueError("a line is no JSON object")
            if "fingerprint" in line:
                fingerprint = line["fingerprint"]
            elif "finished" in line:
                steps.append(Step(line, groups))
                groups = []
            else:
                groups.append(line)
    except (FileNotFoundError, ValueError):
        pass  # ValueError: a damaged line; the steps before it count
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    return fingerprint, steps


def _write(path: Path, mode: str, lines: Sequence[Line]) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
