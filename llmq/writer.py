"""Checkpoints that are either finished or plainly not: shards grow under temporary names, config.json comes last."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmq.errors import RequestError, WorkError
from llmq.source import ModelSource
from llmq.tensor_files import INDEX, SINGLE

REPORT = "llmq_report.json"
# Finished tensors wait in memory for their shard, and once more while it is written.
_SHARD_BYTES = 500_000_000
_COPIED = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
]
_OURS = ("config.json", INDEX, "model*.safetensors", "*.partial", "quantize_config.json", REPORT, *_COPIED)


class Writer:
    """Streams tensors into shards of `directory`; a context manager that leaves nothing behind when the work fails.

    Args:
        overwrite: replace the checkpoint files that are already there (other files are left alone).

    Raises RequestError if the directory is in use, WorkError if the disk is full.
    """

    def __init__(self, directory: Path, overwrite: bool = False, shard_bytes: int = _SHARD_BYTES) -> None:
        self.directory = directory
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
        source: ModelSource,
        dtype: torch.dtype,
        quantization_config: dict[str, Any] | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        """Name the shards, copy the tokenizer, write the report and, last of all, config.json."""
        self.flush()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = SINGLE if len(self._shards) == 1 else f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors"
            os.replace(self._partial(i), self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if len(self._shards) > 1:
            metadata = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            self._write_json(INDEX, metadata)
        self._copy_companions(source)
        if report is not None:
            self._write_json(REPORT, report)
        _sync(self.directory)
        self._write_json("config.json", _config(source, dtype, quantization_config))

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
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _partial(self, index: int) -> Path:
        return self.directory / f"shard-{index:05}.partial"

    def _copy_companions(self, source: ModelSource) -> None:
        if source.is_gguf:  # the tokenizer is inside the file: write it the way transformers does
            source.tokenizer.save_pretrained(self.directory)
            return
        for name in [*_COPIED, *(path.name for path in source.directory.glob("*.py"))]:
            if (source.directory / name).is_file():
                shutil.copyfile(source.directory / name, self.directory / name)
        templates = source.directory / "additional_chat_templates"
        if templates.is_dir():
            shutil.copytree(templates, self.directory / templates.name, dirs_exist_ok=True)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        partial = self.directory / f"{name}.partial"
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _sync(partial)
        os.replace(partial, self.directory / name)


def check_output(directory: Path, overwrite: bool) -> None:
    """Raise RequestError unless `directory` is new, empty, or may be overwritten."""
    if directory.exists() and not directory.is_dir():
        raise RequestError(f"output {directory} is a file; name a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise RequestError(f"output {directory} is not empty; choose another, or pass --overwrite to replace it")


def _config(source: ModelSource, dtype: torch.dtype, quantization_config: dict[str, Any] | None) -> dict[str, Any]:
    """The source's own config text with only the quantization and the dtype replaced."""
    if source.is_gguf:
        config = source.config.to_dict() | {"architectures": [type(source.skeleton).__name__]}
        config.pop("_name_or_path", None)
    else:
        config = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    config |= {"dtype": name, "torch_dtype": name}  # old readers know torch_dtype, new ones dtype
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
