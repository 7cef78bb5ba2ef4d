"""What a training brought, in memory and on disk: a resumed request does not train again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint.output_dir import write_json, written_whole

_TENSORS, _REST = "trained.safetensors", "trained.json"


@dataclass(frozen=True)
class Outcome:
    """What a training brought. `changed`: the tensors of the best state; none if the start is the best."""

    changed: dict[str, Tensor]
    before: float  # loss on held-out sequences
    after: float
    steps: int
    history: list[dict[str, int | float]]  # of each check: step and loss

    def save(self, directory: Path) -> None:
        """Write the outcome into a directory. The second file says that the first one is whole."""
        with written_whole(directory / _TENSORS) as new:
            save_file({name: tensor.contiguous() for name, tensor in self.changed.items()}, new)
        write_json(directory / _REST, asdict(Outcome({}, self.before, self.after, self.steps, self.history)))

    @classmethod
    def load(cls, directory: Path) -> "Outcome | None":
        """Return the outcome that is kept in a directory; None if the training has not ended."""
        if not (directory / _REST).exists():
            return None
        rest = json.loads((directory / _REST).read_text(encoding="utf-8"))
        return cls(**(rest | {"changed": load_file(directory / _TENSORS)}))
