"""Keep results as JSON lines. Each one is written at once, so that a stopped benchmark can be resumed."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Key = tuple[Any, ...]
Row = dict[str, Any]
KERNELS = Path(__file__).parents[2] / "kernels" / "llmq_kernels"
# Changes in these files do not change the results.
_ASIDE = ("__init__.py", "cpu_int4.py", "cpu_native.py")


def kernels_hash(folder: Path = KERNELS) -> str:
    """Return a hash of the source of the kernels. Results of other kernels do not count."""
    sources = [path for path in sorted(folder.glob("*.py")) if path.name not in _ASIDE]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def rows_in(text: str) -> list[Row]:
    """Return the rows of a file, without lines that a killed process left incomplete."""
    return [row for line in text.splitlines() if "kind" in (row := _parsed(line))]


def latest(rows: Iterable[Row], setting: Row) -> dict[Key, Row]:
    """Return the latest row of each kind and key.

    Args:
        setting: device, torch, triton and kernels that the rows must have. Rows that do not depend on our kernels have
            None as kernels; they count too.
    """

    def is_here(row: Row) -> bool:
        same = all(row.get(name) == setting[name] for name in ("device", "torch", "triton"))
        return same and row.get("kernels") in (None, setting["kernels"])

    return {(row["kind"], *row["key"]): row for row in rows if is_here(row)}


def is_good(row: Row) -> bool:
    """Tell whether a row neither failed nor found mistakes."""
    return "failed" not in row and not row.get("wrong")


class Results:
    """The rows of this GPU, these versions and these kernels. Other rows stay in the file and are ignored."""

    def __init__(self, path: Path, gpu: str) -> None:
        self.gpu = gpu
        self._path = path
        self._setting = {"device": gpu, "torch": version("torch"), "triton": version("triton")}
        self._setting["kernels"] = kernels_hash()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._rows = latest(rows_in(text), self._setting)
        self._start = (
            "\n" if text and not text.endswith("\n") else ""
        )  # so that a new row does not join an incomplete line

    def has(self, kind: str, key: Key) -> bool:
        return self.get(kind, *key) is not None

    def get(self, kind: str, *key: Any) -> Row | None:
        row = self._rows.get((kind, *key))
        return row if row and is_good(row) else None

    def of(self, kind: str) -> list[Row]:
        """Return the good rows of a kind, oldest first."""
        return [row for row in self._rows.values() if row["kind"] == kind and is_good(row)]

    def bad(self) -> list[Row]:
        """Return the rows that failed or found mistakes, and were not measured again since."""
        return [row for row in self._rows.values() if not is_good(row)]

    def steps(self) -> dict[str, Row]:
        """Return how each step of the round ended, good or bad."""
        return {row["key"][0]: row for row in self._rows.values() if row["kind"] == "step"}

    def add(self, kind: str, key: Key, values: Row, ours: bool = True) -> None:
        """Write a row to the file, and keep it.

        Args:
            ours: whether the row depends on our kernels.
        """
        row = {"kind": kind, "key": list(key), **values, **self._setting}
        row["kernels"] = self._setting["kernels"] if ours else None
        row["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._rows[(kind, *key)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._start + json.dumps(row) + "\n")
        self._start = ""


def _parsed(line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
