"""The sequences to train on, and those that are held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from llmq.calibration.answers import IGNORED, Example, examples, is_conversations, told
from llmq.calibration.texts import check_text, check_tokens, windows
from llmq.core.errors import RequestError
from llmq.core.settings import Calibration
from llmq.core.train_config import TrainConfig

_HELD_OUT_EVERY, _MOST_HELD_OUT = 10, 32


@dataclass(frozen=True)
class Data:
    """Sequences to train on, others to measure on, and what was left out of the file and why."""

    train: list[Example]
    held_out: list[Example]
    faults: list[str]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all sequences to train on."""
        return sum(len(example.ids) for example in self.train)

    @property
    def left_out(self) -> str:
        """Return a sentence on the rows that were left out; nothing if there are none."""
        return f"{len(self.faults)} rows were left out: {told(self.faults)}" if self.faults else ""


def data_of(config: TrainConfig, tokenizer: Any, model: Any) -> Data:
    """Return the data of a request.

    `model`: on any device; its embeddings say which tokens there are. Raises RequestError if there is too little.
    """
    found, faults = list[Example](), list[str]()
    for name in config.data:
        check_text(name)
    for name in config.data:
        path = Path(name).expanduser()
        if path.is_file() and is_conversations(path):
            some, wrong = examples(path, tokenizer, config.sequence_length, config.samples)
            faults += [f"{path.name}, {fault}" for fault in wrong]
        else:
            some = _of_text(name, config, tokenizer)
        found += some
    if len(found) < 2:
        raise RequestError(f"{', '.join(config.data)} gives one sequence only; one more is needed to measure on")
    check_tokens(model, torch.cat([example.ids for example in found]))
    count = min(_MOST_HELD_OUT, max(1, len(found) // _HELD_OUT_EVERY))
    # In the middle of equal stretches: never the first row, all over the file.
    chosen = {(2 * i + 1) * len(found) // (2 * count) for i in range(count)}
    train, held_out = ([e for i, e in enumerate(found) if (i in chosen) == is_held] for is_held in (False, True))
    return Data(train, held_out, faults)


def _of_text(name: str, config: TrainConfig, tokenizer: Any) -> list[Example]:
    """Return windows of a text; all of their tokens but the first are learned."""
    settings = Calibration(name, 2, config.sequence_length, config.seed)
    found = windows(tokenizer, settings, config.samples - 2)
    return [Example(ids, torch.cat([torch.tensor([IGNORED]), ids[1:]])) for ids in found]


def collated(batch: list[Example]) -> dict[str, Int64[Tensor, "batch length"]]:
    """Return a batch as one matrix of ids and one of labels. Short sequences are filled up at their ends.

    No mask is needed for that: a causal model does not look ahead, and the labels there are ignored.
    """
    ids = torch.nn.utils.rnn.pad_sequence([example.ids for example in batch], batch_first=True)
    labels = [example.labels for example in batch]
    return {"input_ids": ids, "labels": torch.nn.utils.rnn.pad_sequence(labels, True, IGNORED)}
