"""Results as JSON lines: appended as they come, so that a stopped benchmark goes on where it was."""

from __future__ import annotations

import datetime
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llmq_kernels

Key = tuple[Any, ...]
# What these do changes no number a benchmark keeps.
_ASIDE = ("__init__.py", "cpu_int4.py", "trial.py", "tune.py")


def kernels_hash() -> str:
    """Changes with the kernels: what was measured of other ones does not count."""
    folder = Path(llmq_kernels.__file__).parent
    sources = [path for path in sorted(folder.glob("*.py")) if path.name not in _ASIDE]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


class Results:
    """Rows of this GPU, these versions and these kernels; rows of others stay in the file and are not looked at."""

    def __init__(self, path: Path, gpu: str, again: tuple[str, ...] = ()) -> None:
        self._path = path
        self._setting = {"device": gpu, "torch": version("torch"), "triton": version("triton")}
        self._kernels = kernels_hash()
        self._rows: dict[Key, dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = _parsed(line)
            if self._counts(row) and row["kind"] not in again:
                self._rows[(row["kind"], *row["key"])] = row

    def _counts(self, row: dict[str, Any]) -> bool:
        here = all(row.get(name) == value for name, value in self._setting.items())
        return here and row.get("kernels") in (None, self._kernels) and "failed" not in row

    def has(self, kind: str, key: Key) -> bool:
        return (kind, *key) in self._rows

    def get(self, kind: str, *key: Any) -> dict[str, Any] | None:
        return self._rows.get((kind, *key))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Rows of a kind, oldest first."""
        return [row for row in self._rows.values() if row["kind"] == kind]

    def add(self, kind: str, key: Key, values: dict[str, Any], ours: bool = True) -> None:
        """Keep a row. `ours`: it depends on our kernels. One with a `failed` is written but does not count."""
        row = {"kind": kind, "key": list(key), **values, **self._setting, "kernels": self._kernels if ours else None}
        row["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        if "failed" not in row:
            self._rows[(kind, *key)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _parsed(line: str) -> dict[str, Any]:
    """A row; nothing for a line that a killed process left half written."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
