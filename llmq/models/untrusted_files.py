"""Files in a model's directory, which may come from strangers: only regular files inside it are opened."""

import json
from pathlib import Path
from typing import Any

from llmq.core.errors import CheckpointError

_LONGEST_JSON = 200_000_000  # bytes; the index of a model with a million tensors is half of that
_OPENED = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")


def regular_file(directory: Path, name: str, model: Path | None = None) -> Path:
    """Return the path of a file in a directory, which may lie inside that of a whole `model`.

    Links may lead to other files of the directory, or to where the hub's cache keeps the files of its snapshots.
    Raises CheckpointError if the file is missing, is not regular (a pipe would block for ever) or lies elsewhere.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{directory}: {name[:80]!r} is not a plain file name inside the directory")
    path = directory / name
    try:
        home, real = (model or directory).resolve(), path.resolve()
        if not path.exists():
            raise CheckpointError(f"{path} is missing; fetch the model again")
        if not real.is_relative_to(home) and real.parent != home.parent.parent / "blobs":
            raise CheckpointError(f"{path} is a link out of the directory; put a copy of the file there")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
    except (OSError, ValueError, RuntimeError) as error:  # names no file system takes, links in a circle
        raise CheckpointError(f"{directory}: {name[:80]!r} cannot be opened ({type(error).__name__})") from None
    return path


def refuse_odd_files(directory: Path) -> None:
    """Raise CheckpointError if something lies in a model's directory that only looks like one of its files.

    Libraries (tokenizers above all) open the files they find there. They would wait for a pipe or follow a link.
    """
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be opened as a directory ({type(error).__name__})") from None
    for path in paths:
        if path.suffix in _OPENED and (path.is_symlink() or not path.is_dir()):
            regular_file(directory, path.name)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a directory. Raises CheckpointError for anything else."""
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
