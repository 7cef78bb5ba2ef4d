"""Checkpoints that are either finished or plainly not: shards grow under temporary names, config.json comes last."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint import LEGACY
from llmq.companions import COPIED, TEMPLATES, Companions
from llmq.errors import RequestError, WorkError
from llmq.tensor_files import INDEX, SINGLE

REPORT = "llmq_report.json"
# Finished tensors wait in memory for their shard, and once more while it is written.
_SHARD_BYTES = 500_000_000
_OURS = ("config.json", INDEX, "model*.safetensors", "*.partial", *LEGACY, REPORT, *COPIED, TEMPLATES)


class Writer:
    """Streams tensors into shards; a context manager that leaves nothing behind when the work fails.

    Everything is written to `stage`, a directory inside the one asked for, and moved from there when it is finished.

    Args:
        overwrite: replace the checkpoint files that are already there (other files are left alone).

    Raises RequestError if the directory is in use, WorkError if the disk is full.
    """

    def __init__(self, directory: Path, overwrite: bool = False, shard_bytes: int = _SHARD_BYTES) -> None:
        self.directory, self.stage = directory, directory / "unfinished.partial"
        self._overwrite, self._shard_bytes = overwrite, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._made_directory = False

    def __enter__(self) -> Writer:
        check_output(self.directory, self._overwrite)
        self._made_directory = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear()
            self.stage.mkdir()
        except OSError as error:
            raise _explained(error, self.directory) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            return
        if self._made_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
        else:  # whatever is there under our names is ours: __enter__ removed what was there before
            self._clear()
        if isinstance(error, OSError | SafetensorError):
            raise _explained(error, self.directory) from None

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors that belong together (those of one module never straddle two shards)."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self.flush()
        # A copy on the CPU of our own: safetensors wants contiguous tensors that share no memory.
        self._pending.update({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        self._pending_bytes += size
        self._total_bytes += size

    def flush(self) -> None:
        """Write what still waits for its shard."""
        if self._pending:
            path = self._partial(len(self._shards))
            save_file(self._pending, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_umask())  # safetensors makes files only their owner can read
            _sync(path)
            self._shards.append(sorted(self._pending))
            self._pending, self._pending_bytes = {}, 0

    def finish(
        self,
        companions: Companions,
        dtype: torch.dtype | None = None,
        quantization_config: dict[str, Any] | None = None,
        report: Callable[[], dict[str, Any]] | None = None,
        check: Callable[[Path], object] | None = None,
    ) -> None:
        """Name the shards, copy the tokenizer, let `check` look at the whole, and only then let others see it.

        Args:
            dtype: of the unquantized weights, for config.json; None keeps what it says.
            report: asked after the check.
            check: given the directory where all but the report lies; what it raises ends the work.
        """
        self.flush()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = SINGLE if len(self._shards) == 1 else f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors"
            os.replace(self._partial(i), self.stage / final)
            weight_map.update(dict.fromkeys(names, final))
        if len(self._shards) > 1:
            metadata = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            self._write_json(INDEX, metadata)
        companions.write(self.stage)
        for name in LEGACY[:1] if (quantization_config or {}).get("quant_method") == "gptq" else ():
            self._write_json(name, quantization_config or {})  # where GPTQModel and AutoGPTQ look first
        self._write_json("config.json", _config(companions.config, dtype, quantization_config))
        if check is not None:
            check(self.stage)
        if report is not None:
            self._write_json(REPORT, report())
        self._publish()

    def _publish(self) -> None:
        """Move what is finished to where it was asked for, config.json last."""
        for path in sorted(self.stage.iterdir(), key=lambda path: path.name == "config.json"):
            if path.name == "config.json":
                _sync(self.directory)
            if path.is_dir():
                shutil.rmtree(self.directory / path.name, ignore_errors=True)
            os.replace(path, self.directory / path.name)
        self.stage.rmdir()

    @contextmanager
    def workroom(self) -> Iterator[Path]:
        """A directory for what is not the result yet; gone afterwards."""
        room = self.directory / "work.partial"
        room.mkdir()
        try:
            yield room
        finally:
            shutil.rmtree(room, ignore_errors=True)

    def _clear(self) -> None:
        for pattern in _OURS:
            for path in self.directory.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _partial(self, index: int) -> Path:
        return self.stage / f"shard-{index:05}.partial"

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        path = self.stage / name
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _sync(path)


def check_output(directory: Path, overwrite: bool) -> None:
    """Raise RequestError unless `directory` is new, empty, or may be overwritten."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"output {directory} is a file; name a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise RequestError(f"output {directory} is not empty; choose another, or pass --overwrite to replace it")


def _config(
    config: dict[str, Any], dtype: torch.dtype | None, quantization_config: dict[str, Any] | None
) -> dict[str, Any]:
    """The source's own config with only the quantization and the dtype replaced."""
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        config = config | {"dtype": name, "torch_dtype": name}  # old readers know torch_dtype, new ones dtype
    return config if quantization_config is None else config | {"quantization_config": quantization_config}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: Exception, directory: Path) -> WorkError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or any(
        sign in str(error) for sign in ("No space left", "File too large", "quota")
    )
    if full:
        free = shutil.disk_usage(directory if directory.exists() else Path.cwd()).free / 1e9
        return WorkError(f"cannot write to {directory}: disk full or file size limited ({free:.1f} GB free)")
    return WorkError(f"cannot write to {directory}: {error}")
