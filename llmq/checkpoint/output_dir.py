"""The directory that a checkpoint is written to: what lies there when, who may write there, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmq.checkpoint.model_files import COPIED, TEMPLATES
from llmq.checkpoint.reader import LEGACY
from llmq.core.errors import RequestError, WorkError
from llmq.models.safetensors_files import INDEX

REPORT = "llmq_report.json"
PROGRESS = "llmq_progress.jsonl"
PICTURE = "llmq_report.png"
UNFINISHED, EMPTIED = "unfinished.partial", "emptied.partial"
_REPORTS = (REPORT, PROGRESS, PICTURE)
# In this order they are removed: what says that a run can be gone on with, or is finished, before what it speaks of.
_OURS = (*_REPORTS, "config.json", INDEX, "model*.safetensors", "*.partial", *LEGACY, *COPIED, TEMPLATES)


def unfinished_work(directory: Path) -> Path:
    """Where an unfinished run into `directory` keeps what it needs to go on."""
    return directory / UNFINISHED / "work"


def existing_parent(path: Path) -> Path:
    """The path, or the innermost directory above it that is there. Raises OSError where one may not look."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def remove_leftovers(directory: Path) -> None:
    """Remove what a finished run into `directory` left there, if it was killed while it removed that itself."""
    shutil.rmtree(directory / EMPTIED, ignore_errors=True)


def clear(directory: Path) -> None:
    """Remove what llmq wrote, and no other file."""
    for pattern in _OURS:
        for path in directory.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_output(directory: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise RequestError unless `directory` is new, empty, may be overwritten, or holds what may be gone on with."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"output {directory} is a file; name a directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    Claim(directory).release()
    unfinished = (directory / UNFINISHED).is_dir()
    if overwrite or (resume and (unfinished or (directory / REPORT).exists())):
        return
    if unfinished:
        raise RequestError(f"{directory} holds an unfinished run; --resume goes on with it, --overwrite begins anew")
    raise RequestError(f"output {directory} is not empty; choose another, or pass --overwrite to replace it")


class Claim:
    """A directory that this process alone writes to, until it releases it or ends; others are refused.

    Where the system cannot lock a directory (Windows, some network file systems) nobody is refused.

    Raises RequestError if another process writes there.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptor: int | None = None
        if sys.platform == "win32":
            return
        import fcntl

        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except OSError:  # which whoever writes there will meet, too
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RequestError(
                    f"another process writes to {directory}; wait until it ends, or choose another --output"
                ) from None
        else:
            self._descriptor = descriptor

    def release(self) -> None:
        """Let others write there. May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is to be at `path`, whole or not at all."""
    new = path.with_name(path.name + ".new")
    yield new
    sync(new)
    os.replace(new, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    with whole(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Return when a file, or the names in a directory, will survive the machine going down."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: Exception, directory: Path) -> WorkError:
    """What a failure to write means, in words."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or any(
        sign in str(error) for sign in ("No space left", "File too large", "quota")
    )
    if full:
        free = shutil.disk_usage(directory if directory.exists() else Path.cwd()).free / 1e9
        return WorkError(f"cannot write to {directory}: disk full or file size limited ({free:.1f} GB free)")
    return WorkError(f"cannot write to {directory}: {error}")
