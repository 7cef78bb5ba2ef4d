"""Conversations to train on: token ids, and labels that hold the answers of the assistant only.

The chat template writes the whole conversation. It also writes it up to each answer, with the words that ask for one.
What the first text has beyond the second is the answer, and the mark that ends it. So the model learns to write what it
must write in use, and nothing that the user says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from llmq.calibration.text_files import messages_of, rows_of, written
from llmq.core.errors import RequestError, first_line

IGNORED = -100  # a label that counts for nothing: what torch's cross entropy leaves out
_LOOKED_AT = 1000  # rows, to learn what a file holds
_SHOWN = 5  # rows that are told one by one


@dataclass(frozen=True)
class Example:
    """A sequence to train on. `labels` are the ids of the tokens to learn, `IGNORED` elsewhere."""

    ids: Int64[Tensor, "length"]
    labels: Int64[Tensor, "length"]


def is_conversations(path: Path) -> bool:
    """Return whether one of the first rows of a file is a conversation, not a text."""
    return any(isinstance(row, dict) and "text" not in row for _, row in islice(rows_of(path), _LOOKED_AT))


def examples(path: Path, tokenizer: Any, longest: int, most: int | None = None) -> tuple[list[Example], list[str]]:
    """Return the conversations of a file that can be trained on, and what is wrong with the others, one line a row.

    Args:
        longest: tokens that one may have.
        most: after so many the rest of the file is not read; None: it is read to its end.

    Raises RequestError if there are none, or if the model has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise RequestError(f"{path} holds conversations, but the model has no chat template; give rows with a text")
    if not tokenizer.is_fast:
        raise RequestError(f"{type(tokenizer).__name__} does not say where its tokens lie, so answers cannot be found")
    found, faults = list[Example](), list[str]()
    for number, row in rows_of(path):
        if len(found) == most:
            break
        try:
            example = _example(row, tokenizer)
            if len(example.ids) > longest:
                raise ValueError(f"{len(example.ids)} tokens, more than --sequence-length {longest}")
            found.append(example)
        except (ValueError, TypeError, RequestError) as error:
            faults.append(f"row {number}: {first_line(error)}")
    if not found:
        raise RequestError(f"{path} holds no conversation to train on: {told(faults)}")
    return found, faults


def told(faults: list[str]) -> str:
    """Return the first faults, and how many more there are."""
    more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
    return ("; ".join(faults[:_SHOWN]) or "the file is empty") + more


def _example(row: Any, tokenizer: Any) -> Example:
    """Return a row as an example. Raises ValueError, TypeError or RequestError if it is none."""
    if not isinstance(row, dict):
        raise TypeError(f"{type(row).__name__} instead of a conversation")
    messages = messages_of(row)
    text = written(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = encoded["input_ids"], list(_answers(tokenizer, messages, text))
    if not spans:
        raise ValueError("no answer of an assistant")
    learned = [any(start <= at < stop for start, stop in spans) for at, _ in encoded["offset_mapping"]]
    learned[:1] = [False] * len(learned[:1])  # nothing predicts the first token
    if not any(learned):
        raise ValueError("its answers are empty")
    labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
    return Example(torch.tensor(ids), torch.tensor(labels))


def _answers(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> Iterator[tuple[int, int]]:
    """Yield where each answer begins and ends in the text.

    Some templates change earlier turns when later ones follow, for example by leaving out thoughts. Then the answers
    before the last one are not where they seem to be, and are left out. Raises ValueError if the last one is not, too.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in turns:
        before = written(tokenizer, messages[:i], add_generation_prompt=True)
        after = text if i == len(messages) - 1 else written(tokenizer, messages[: i + 1])
        if text.startswith(before) and text.startswith(after) and str(messages[i]["content"]).strip():
            yield len(before), len(after)
        elif i == turns[-1]:
            raise ValueError("the last answer is empty, or the chat template does not begin it as it asks for one")
