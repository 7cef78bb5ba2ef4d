"""llmq_progress.jsonl: what a run has done so far, one JSON object a line; people watch it, `--resume` goes on from it.

    {"fingerprint": …}                       the first line: what the run depends on
    {"block": …, "linears": …, "error": …}   a group of linears, as it is solved
    {"finished": "model.layers.0", …}        a block whose tensors are on disk, and what the rest of the run must know
    …

A line is only added when what it speaks of is on disk, and what follows the last finished block does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.core.errors import RequestError

Line = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A block that an earlier process finished, or what lies outside the blocks, which comes first."""

    finished: Line
    groups: list[Line] = field(default_factory=list)
    """The lines of its groups."""


class Journal:
    """The file, open for adding to it.

    Args:
        path: of the file; None for a run that leaves none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def begin(self, fingerprint: Mapping[str, Any], steps: Sequence[Step] = ()) -> None:
        """A new file, with what earlier processes finished. Raises OSError if it cannot be written."""
        if self._path is not None:
            lines = [line for step in steps for line in (*step.groups, step.finished)]
            new = self._path.with_name(self._path.name + ".partial")
            _write(new, "w", [{"fingerprint": fingerprint}, *lines])
            os.replace(new, self._path)

    def add(self, line: Line) -> None:
        """One line more. It is on the disk when this returns, whatever happens then."""
        if self._path is not None:
            _write(self._path, "a", [line])


def read_journal(path: Path) -> tuple[Line, list[Step]]:
    """The fingerprint and the finished steps of a journal; empty where there is none.

    Raises RequestError if it cannot be read.
    """
    fingerprint, steps, groups = Line(), list[Step](), list[Line]()
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what has no end was being written
        for line in map(json.loads, lines):
            if "fingerprint" in line:
                fingerprint = line["fingerprint"]
            elif "finished" in line:
                steps.append(Step(line, groups))
                groups = []
            else:
                groups.append(line)
    except (FileNotFoundError, ValueError):
        pass  # a line that was never finished: what comes before it stands
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    return fingerprint, steps


def _write(path: Path, mode: str, lines: Sequence[Line]) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
