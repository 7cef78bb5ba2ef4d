"""The directory that a checkpoint is written to: its files, the lock on it, and safe ways to write there."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmq.checkpoint.model_files import COPIED, TEMPLATES
from llmq.checkpoint.reader import CONFIG, LEGACY
from llmq.core.errors import RequestError, WorkError
from llmq.models.locate import gguf_in
from llmq.models.safetensors_files import INDEX

REPORT = "llmq_report.json"
PROGRESS = "llmq_progress.jsonl"
PICTURE = "llmq_report.png"
ADAPTER = "adapter"  # a directory of LoRA adapters beside the model
UNFINISHED, EMPTIED = "unfinished.partial", "emptied.partial"
# In the order of removal: first the files that mark a run as finished or resumable, then the data they refer to.
_OURS = (REPORT, PROGRESS, PICTURE, CONFIG, INDEX, "model*.safetensors", "*.partial", *LEGACY, *COPIED, TEMPLATES)


def unfinished_work(directory: Path) -> Path:
    """Return the directory where an unfinished run into `directory` keeps the files that --resume needs."""
    return directory / UNFINISHED / "work"


def existing_parent(path: Path) -> Path:
    """Return the path, or the innermost existing directory above it. Raises OSError if a directory is not readable."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def may_write_in(directory: Path) -> bool:
    """Return whether files can be written in a directory, which need not be there yet. Writes nothing itself."""
    try:
        parent = existing_parent(directory)
        return parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    except OSError:
        return False


def holds_checkpoint(directory: Path) -> bool:
    """Return whether a finished checkpoint is in the directory: config.json and a .gguf file are moved there last."""
    return (directory / CONFIG).exists() or gguf_in(directory) is not None


def remove_leftovers(directory: Path) -> None:
    """Remove the working files of a finished run, which stay in `directory` if the run is killed at its very end."""
    shutil.rmtree(directory / EMPTIED, ignore_errors=True)


def clear(directory: Path) -> None:
    """Remove the files that llmq wrote, and no others. The report lists those that it copied."""
    copied: list[Path] = []
    for report in (directory / REPORT, directory / UNFINISHED / "checkpoint" / REPORT):
        with suppress(OSError, ValueError, TypeError, AttributeError):  # if it is not there, or damaged
            names = json.loads(report.read_text(encoding="utf-8")).get("copied", ())
            copied += [directory / name for name in names if Path(name).name == name]
    for pattern in _OURS:
        for path in directory.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for path in filter(Path.is_file, copied):
        path.unlink()
    if directory / ADAPTER in copied:
        shutil.rmtree(directory / ADAPTER, ignore_errors=True)


def check_output(directory: Path, overwrite: bool, resume: bool = False) -> None:
    """Raise RequestError unless `directory` is new, empty, may be overwritten, or holds a run that may be resumed."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"output {directory} is a file; name a directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    Claim(directory).release()
    unfinished = (directory / UNFINISHED).is_dir()
    if overwrite or (resume and (unfinished or (directory / REPORT).exists())):
        return
    if unfinished:
        raise RequestError(f"{directory} holds an unfinished run; --resume continues it, --overwrite starts anew")
    raise RequestError(f"output {directory} is not empty; choose another, or pass --overwrite to replace it")


class Claim:
    """Lock a directory, so that only this process writes to it. The lock ends with `release` or with the process.

    The directory itself is locked: a lock file would stay there after `kill -9`, and could not be removed safely while
    another process opens it. Where the system cannot lock a directory (Windows, some network file systems), nobody is
    refused.

    Raises RequestError if another process writes there.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptor: int | None = None
        if sys.platform == "win32":
            return
        import fcntl

        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except OSError:  # writing there will fail with the same error, and say so
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RequestError(f"another process writes to {directory}; wait, or choose another --output") from None
        else:
            self._descriptor = descriptor

    def release(self) -> None:
        """Unlock the directory. May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def written_whole(path: Path) -> Generator[Path]:
    """Yield another path to write to; then move that file to `path`. So a file is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    yield new
    sync(new)
    os.replace(new, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk itself and survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(error: Exception, directory: Path) -> WorkError:
    """Return the WorkError that tells the user why `directory` could not be written to."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or any(
        sign in str(error) for sign in ("No space left", "File too large", "quota")
    )
    if full:
        free = shutil.disk_usage(directory if directory.exists() else Path.cwd()).free / 1e9
        return WorkError(f"cannot write to {directory}: disk full or file size limited ({free:.1f} GB free)")
    return WorkError(f"cannot write to {directory}: {error}")
