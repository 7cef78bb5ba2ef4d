"""Files of a model's directory, which may come from strangers: what lies in it is opened, and no more of it read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmq.errors import CheckpointError

_LONGEST_JSON = 200_000_000  # bytes; the index of a model with a million tensors is half of that


def regular_file(directory: Path, name: str) -> Path:
    """The path of a file in a directory.

    Links may lead to other files of the directory, or to where the hub's cache keeps the files of its snapshots.
    Raises CheckpointError if the file is not there, is none (a pipe would block for ever) or lies elsewhere.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{directory}: {name[:80]!r} is not a plain file name inside the directory")
    path = directory / name
    try:
        home, real = directory.resolve(), path.resolve()
        if not path.exists():
            raise CheckpointError(f"{path} is missing; fetch the model again")
        if not real.is_relative_to(home) and real.parent != home.parent.parent / "blobs":
            raise CheckpointError(f"{path} is a link out of the directory; put a copy of the file there")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
    except (OSError, ValueError, RuntimeError) as error:  # names no file system takes, links in a circle
        raise CheckpointError(f"{directory}: {name[:80]!r} cannot be opened ({type(error).__name__})") from None
    return path


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a directory. Raises CheckpointError for anything else."""
    path = regular_file(directory, name)
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; no model needs that many")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory} holds no readable {name} ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
