"""Checkpoints that are either finished or plainly not: shards grow under temporary names, config.json comes last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint.model_files import Companions
from llmq.checkpoint.output_dir import (
    EMPTIED,
    REPORT,
    UNFINISHED,
    Claim,
    check_output,
    clear,
    explained,
    remove_leftovers,
    sync,
    unfinished_work,
    write_json,
)
from llmq.checkpoint.reader import LEGACY
from llmq.checkpoint.shard_join import grouped, join, sizes_in
from llmq.core.errors import CheckpointError
from llmq.models.safetensors_files import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000
# Finished tensors wait in memory for their part, and once more while it is written.
_PART_BYTES = 100_000_000
_CHECKED = "checked"


class Writer:
    """Streams tensors into parts on disk and joins them to shards; leaves nothing that looks finished when it fails.

        OUTPUT/unfinished.partial/work/part-00007.safetensors    tensors as they come, and what a resumed run needs
        OUTPUT/unfinished.partial/checkpoint/                    the whole, once all are there
        OUTPUT/                                                  where it is moved when it has been checked

    Args:
        overwrite: replace the checkpoint files that are already there (other files are left alone).
        resume: go on with what an earlier Writer left in `work`; the caller says with `keep_parts` what of it.

    Raises RequestError if the directory is in use, WorkError if the disk is full.
    """

    def __init__(
        self, directory: Path, overwrite: bool = False, resume: bool = False, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.directory, root = directory, directory / UNFINISHED
        self.stage, self.work = root / "checkpoint", unfinished_work(directory)
        self.resumable = resume
        """Whether to leave `work` there when the work fails."""
        self._overwrite, self._resume, self._shard_bytes = overwrite, resume, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self.parts = 0
        """On disk so far."""
        self._made_directory = False
        self._claim: Claim | None = None

    def __enter__(self) -> Writer:
        check_output(self.directory, self._overwrite, self._resume)
        self._made_directory = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._claim = Claim(self.directory)
            if not self._resume:
                clear(self.directory)
            for directory in (self.stage, self.work):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._release()
            raise explained(error, self.directory) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is not None:
                self._fail(error)
        finally:
            self._release()

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()

    def _fail(self, error: BaseException) -> None:
        """Leave what a run can go on with, and nothing else."""
        if not self.resumable:
            if self._made_directory:
                shutil.rmtree(self.directory, ignore_errors=True)
            else:  # whatever is there under our names is ours: __enter__ removed what was there before
                with suppress(OSError):  # from a directory that became read-only: nothing there looks finished
                    clear(self.directory)
        if isinstance(error, OSError | SafetensorError):
            raise explained(error, self.directory) from None

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors that belong together (those of one module never straddle two shards)."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > min(_PART_BYTES, self._shard_bytes):
            self.flush()
        # A copy on the CPU of our own: safetensors wants contiguous tensors that share no memory.
        self._pending.update({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        self._pending_bytes += size

    def flush(self) -> None:
        """Write what still waits for its part."""
        if self._pending:
            save_file(self._pending, self._part(self.parts), metadata={"format": "pt"})
            sync(self._part(self.parts))
            self.parts += 1
            self._pending, self._pending_bytes = {}, 0

    def keep_parts(self, count: int) -> None:
        """Go on after this many parts of an earlier Writer; what it wrote after them is written anew."""
        self.parts = count

    def read_parts(self, first: int, stop: int) -> dict[str, Tensor]:
        """The tensors of these parts."""
        return {name: tensor for i in range(first, stop) for name, tensor in load_file(self._part(i)).items()}

    def finish(
        self,
        companions: Companions,
        dtype: torch.dtype | None = None,
        quantization_config: dict[str, Any] | None = None,
        report: Callable[[], dict[str, Any]] | None = None,
        check: Callable[[Path], object] | None = None,
    ) -> None:
        """Join the shards, copy the tokenizer, let `check` look at the whole, and only then let others see it.

        Args:
            dtype: of the unquantized weights, for config.json; None keeps what it says.
            report: asked after the check.
            check: given the directory where all but the report lies; what it raises ends the work.
        """
        self.flush()
        for path in self.stage.iterdir():  # of a process that came this far before
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".safetensors":
                path.unlink()
        self._join()
        companions.write(self.stage)
        for name in LEGACY[:1] if (quantization_config or {}).get("quant_method") == "gptq" else ():
            self._write_json(name, quantization_config or {})  # where GPTQModel and AutoGPTQ look first
        self._write_json("config.json", _config(companions.config, dtype, quantization_config))
        if check is not None:
            try:
                check(self.stage)
            except CheckpointError:
                self.resumable = False  # the parts are gone: there is nothing to go on from
                raise
        if report is not None:
            self._write_json(REPORT, report())
        self.publish()

    def _join(self) -> None:
        """Parts become shards, one after the other: the disk holds one shard twice at most.

        What is where is written down first, so that this too can be gone on with.
        """
        plan_file = self.work / "shards.json"
        if not plan_file.exists():
            sizes = [sum(sizes_in(self._part(i)).values()) for i in range(self.parts)]
            write_json(plan_file, {"shards": grouped(sizes, self._shard_bytes), "total_size": sum(sizes)})
        plan = json.loads(plan_file.read_text())
        shards: list[list[int]] = plan["shards"]
        weight_map: dict[str, str] = {}
        for i, parts in enumerate(shards):
            final = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            if not (self.stage / final).exists():
                joined = self.work / "joined.partial"
                join([self._part(part) for part in parts], joined)
                os.replace(joined, self.stage / final)
            for part in parts:
                self._part(part).unlink(missing_ok=True)
            weight_map.update(dict.fromkeys(sizes_in(self.stage / final), final))
        if len(shards) > 1:
            index = {"metadata": {"total_size": plan["total_size"]}, "weight_map": dict(sorted(weight_map.items()))}
            self._write_json(INDEX, index)

    @property
    def is_checked(self) -> bool:
        """Whether an earlier Writer had finished but for moving its files to where they belong."""
        return (self.stage.parent / _CHECKED).exists()

    def publish(self) -> None:
        """Move what is finished to where it was asked for, config.json last."""
        (self.stage.parent / _CHECKED).touch()
        for path in sorted(self.stage.iterdir(), key=lambda path: path.name == "config.json"):
            if path.name == "config.json":
                sync(self.directory)
            if path.is_dir():
                shutil.rmtree(self.directory / path.name, ignore_errors=True)
            os.replace(path, self.directory / path.name)
        os.replace(self.stage.parent, self.directory / EMPTIED)
        remove_leftovers(self.directory)

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint is where it belongs."""
        return (self.directory / "config.json").exists() and not self.is_checked

    @contextmanager
    def workroom(self) -> Iterator[Writer]:
        """A writer for what is not the result yet; gone with the work."""
        room = self.work / "first"
        inner = Writer(room, resume=room.exists())
        try:
            with inner:
                yield inner
        except CheckpointError:
            self.resumable = False  # what was made is damaged: there is nothing to go on from
            raise
        finally:
            self.resumable |= inner.resumable
        shutil.rmtree(room, ignore_errors=True)

    def _part(self, index: int) -> Path:
        return self.work / f"part-{index:05}.safetensors"

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_json(self.stage / name, content)


def _config(
    config: dict[str, Any], dtype: torch.dtype | None, quantization_config: dict[str, Any] | None
) -> dict[str, Any]:
    """The source's own config with only the quantization and the dtype replaced."""
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        config = config | {"dtype": name, "torch_dtype": name}  # old readers know torch_dtype, new ones dtype
    return config if quantization_config is None else config | {"quantization_config": quantization_config}
