"""Write a checkpoint that is either finished or visibly unfinished: config.json is written last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint.model_files import Companions
from llmq.checkpoint.output_dir import (
    EMPTIED,
    REPORT,
    UNFINISHED,
    Claim,
    check_output,
    clear,
    holds_checkpoint,
    remove_leftovers,
    sync,
    unfinished_work,
    write_error,
    write_json,
)
from llmq.checkpoint.reader import CONFIG, LEGACY
from llmq.checkpoint.shard_join import join_shards, tensors_in
from llmq.core.errors import CheckpointError
from llmq.formats import method_of, mlx

SHARD_BYTES = 5_000_000_000
# Tensors wait in memory until a part is full. They are there twice while safetensors writes them.
_PART_BYTES = 100_000_000


class Writer:
    """Write tensors into parts on disk, join these to shards, and publish the checkpoint when it has been checked.

    These are the states of an output directory. WORK and STAGE are `work` and `checkpoint` in
    OUTPUT/unfinished.partial. Each state is marked by files that the state before has not:

        state       files                                 what --resume does after a kill
        claimed     WORK and STAGE, empty                 starts anew
        streaming   WORK/part-00000.safetensors, …        keeps the parts of finished steps, writes the others again
        joining     WORK/shards.json, STAGE/model*        keeps the shards, joins those that are missing
        staged      STAGE/config.json, tokenizer, …       keeps the shards, writes other files again, checks all again
        checked     OUTPUT/unfinished.partial/checked     moves the files that are still in STAGE (`is_checked`)
        published   OUTPUT/config.json, no `checked`      removes OUTPUT/emptied.partial (`is_finished`)

    A failure removes all files of ours, and the directory if this Writer made it. If `resumable` is set, a failure
    leaves them as a kill does. The lock on the directory ends with the process.

    Args:
        overwrite: replace the checkpoint files that are already there; other files stay.
        resume: keep what an earlier Writer left. The caller says with `keep_parts` which of its parts are valid.

    Raises RequestError if the directory is in use, WorkError if the disk is full.
    """

    def __init__(
        self, directory: Path, overwrite: bool = False, resume: bool = False, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.directory, self._unfinished = directory, directory / UNFINISHED
        self.stage, self.work = self._unfinished / "checkpoint", unfinished_work(directory)
        self._checked = self._unfinished / "checked"
        self.resumable = resume  # whether files stay when the work fails
        self.parts = 0  # number of parts on disk
        self._overwrite, self._shard_bytes = overwrite, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._claim: Claim | None = None
        self._made_directory = False

    def __enter__(self) -> Writer:
        check_output(self.directory, self._overwrite, self.resumable)
        self._made_directory = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._claim = Claim(self.directory)
            if not self.resumable:
                clear(self.directory)
            for directory in (self.stage, self.work):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._release()
            raise write_error(error, self.directory) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is not None and not self.resumable:
                self._remove_all()
            if isinstance(error, OSError | SafetensorError):
                raise write_error(error, self.directory) from None
        finally:
            self._release()

    def _remove_all(self) -> None:
        """Remove the directory if this Writer made it, else all files of ours: `__enter__` removed older ones."""
        if self._made_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            with suppress(OSError):  # in a directory that became read-only; nothing there looks finished
                clear(self.directory)

    def _release(self) -> None:
        if self._claim is not None:
            self._claim.release()

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Add tensors that belong together; they are written into the same part, and so into the same shard."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending_bytes + size > min(_PART_BYTES, self._shard_bytes):
            self.flush()
        # A copy on the CPU of our own: safetensors wants contiguous tensors that share no memory.
        self._pending |= {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        self._pending_bytes += size

    def flush(self) -> None:
        """Write the tensors that wait in memory into a part."""
        if self._pending:
            save_file(self._pending, self._part(self.parts), metadata={"format": "pt"})
            sync(self._part(self.parts))
            self.parts += 1
            self._pending, self._pending_bytes = {}, 0

    def keep_parts(self, count: int) -> None:
        """Continue after the first `count` parts of an earlier Writer. Parts that it wrote later are overwritten."""
        self.parts = count

    def read_parts(self, first: int, stop: int) -> dict[str, Tensor]:
        """Return the tensors of the parts from `first` to before `stop`."""
        return tensors_in(map(self._part, range(first, stop)))

    def _part(self, index: int) -> Path:
        return self.work / f"part-{index:05}.safetensors"

    def finish(
        self,
        companions: Companions,
        dtype: torch.dtype | None = None,
        quantization_config: dict[str, Any] | None = None,
        report: Callable[[], dict[str, Any]] | None = None,
        check: Callable[[Path], object] | None = None,
    ) -> None:
        """Join the shards, write the other files beside them, check the result, and publish it.

        Args:
            dtype: of the unquantized weights, for config.json; None keeps the one that is there.
            report: called after the check; its result is written as llmq_report.json.
            check: called with the directory of the complete checkpoint; an exception ends the work.
        """
        self.flush()
        self._clear_stage()
        parts = [self._part(i) for i in range(self.parts)]
        is_mlx = quantization_config is not None and method_of(quantization_config) == mlx.METHOD
        stack_of = mlx.stack_of if is_mlx and companions.config.get("model_type") in mlx.STACKED else None
        join_shards(parts, self.work / "shards.json", self.stage, self._shard_bytes, stack_of)
        companions.write(self.stage)
        copied = sorted(path.name for path in self.stage.iterdir() if path.suffix != ".safetensors")
        if quantization_config is not None and quantization_config.get("quant_method") == "gptq":
            write_json(self.stage / LEGACY[0], quantization_config)  # where GPTQModel and AutoGPTQ look first
        write_json(self.stage / CONFIG, _config(companions.config, dtype, quantization_config))
        if check is not None:
            with self._nothing_to_resume_if_damaged():  # the parts are gone
                check(self.stage)
        if report is not None:
            write_json(self.stage / REPORT, report() | {"copied": copied})
        self.publish()

    def _clear_stage(self) -> None:
        """Remove all that an earlier process staged, but for its shards: their parts are gone."""
        for path in self.stage.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".safetensors":
                path.unlink()

    @contextmanager
    def _nothing_to_resume_if_damaged(self) -> Generator[None]:
        """Make a CheckpointError remove all files: they are damaged."""
        try:
            yield
        except CheckpointError:
            self.resumable = False
            raise

    @property
    def is_checked(self) -> bool:
        """Whether an earlier Writer finished and checked the checkpoint, but did not move all its files."""
        return self._checked.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint is published."""
        return holds_checkpoint(self.directory) and not self.is_checked

    def finish_gguf(self, write: Callable[[Path], dict[str, Any]]) -> None:
        """Publish a .gguf file. `write` puts it into a directory, checked, and returns the report."""
        self._clear_stage()
        report = write(self.stage)
        write_json(self.stage / REPORT, report | {"copied": [path.name for path in self.stage.glob("*.gguf")]})
        self.publish()

    def publish(self) -> None:
        """Move the checked files into the output directory; last what makes a checkpoint: config.json, or a .gguf."""
        self._checked.touch()
        for path in sorted(self.stage.iterdir(), key=_comes_last):
            if _comes_last(path):
                sync(self.directory)
            if path.is_dir():
                shutil.rmtree(self.directory / path.name, ignore_errors=True)
            os.replace(path, self.directory / path.name)
        os.replace(self._unfinished, self.directory / EMPTIED)
        remove_leftovers(self.directory)

    @contextmanager
    def workroom(self) -> Generator[Writer]:
        """Yield a Writer of a first checkpoint, from which this one is made. It is removed when the work is done.

        If an interrupted run finished it, it is published.
        """
        room = self.work / "first"
        inner = Writer(room, resume=room.exists())
        try:
            with self._nothing_to_resume_if_damaged(), inner:
                if inner.is_checked:
                    inner.publish()
                yield inner
        finally:
            self.resumable |= inner.resumable
        shutil.rmtree(room, ignore_errors=True)


def by_module(files: Any, changed: Mapping[str, Tensor]) -> Generator[dict[str, Tensor]]:
    """Yield all tensors of a checkpoint's files, module by module, changed ones in place of the old ones."""
    for _, names in groupby(sorted(files.names() | changed.keys()), key=lambda name: name.rpartition(".")[0]):
        yield {name: changed[name] if name in changed else files.read(name) for name in names}


def _comes_last(path: Path) -> bool:
    return path.name == CONFIG or path.suffix == ".gguf"


def _config(
    config: dict[str, Any], dtype: torch.dtype | None, quantization_config: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the config of the source with only the quantization and the dtype replaced."""
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        config = config | {"dtype": name, "torch_dtype": name}  # old readers know torch_dtype, new ones dtype
    if quantization_config is None:
        return config
    config = {**config, "quantization_config": quantization_config}
    config.pop(mlx.SETTINGS, None)
    is_mlx = method_of(quantization_config) == mlx.METHOD
    return mlx.with_settings(config, quantization_config) if is_mlx else config
