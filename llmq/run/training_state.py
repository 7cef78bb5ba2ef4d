"""The state of a training from end to end, on disk, so that a run that was interrupted there can go on.

One file in the workroom: what learns, Adam's moments, the step, and the best state so far. It is written now and then.
"""

import sys
import time
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint.output_dir import written_whole
from llmq.core.errors import first_line

_SECONDS = 60.0  # between two states, at least
_SHARE = 0.02  # of the time is spent on writing states, at most


class TrainingState:
    """Keeps the state of a training in a file: see llmq.training.loop.Saved."""

    def __init__(self, path: Path) -> None:
        self._path, self._next = path, time.monotonic() + _SECONDS

    @property
    def is_due(self) -> bool:
        """Return whether enough time has passed since the state was written."""
        return time.monotonic() >= self._next

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Replace the file. If that fails, the training goes on all the same, and the user is told."""
        start = time.monotonic()
        try:
            with written_whole(self._path) as new:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, new)
        except (OSError, SafetensorError) as error:
            print(f"\nthe training's state cannot be kept ({first_line(error)}); it goes on", file=sys.stderr)
        end = time.monotonic()
        self._next = end + max(_SECONDS, (end - start) / _SHARE)

    def load(self) -> dict[str, Tensor]:
        """Return the tensors of the file; none if it cannot be read."""
        try:
            return load_file(self._path)
        except (OSError, SafetensorError):
            return {}
