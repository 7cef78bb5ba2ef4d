"""The documents of a file: a .txt is one; a row of a .jsonl or .parquet is one, as text or as a conversation.

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    {"prompt": "…", "completion": "…"}                                    text, or lists of messages

Conversations become text by the chat template of the model, so calibration sees what the model will see in use.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from llmq.core.errors import RequestError, WorkError, first_line

# Enough text for any calibration. Tokenizing more of a large file would only take time.
MOST_CHARACTERS = 64_000_000
_COLUMNS = ("text", "messages", "conversations", "prompt", "completion")
_ROLES = {"human": "user", "gpt": "assistant"}


def documents(path: Path, tokenizer: Any = None) -> Iterator[str]:
    """Yield the documents of a file. `tokenizer`: of the model; conversations need its chat template.

    Raises RequestError if the file is of no known kind or the template does not take a conversation, WorkError if a row
    cannot be read.
    """
    for number, row in rows_of(path):
        try:
            document = _text_of(row, tokenizer)
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, number, error) from None
        except RequestError as error:
            raise RequestError(f"{path}, row {number}: {error}") from None
        yield document


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the content of each row of a file, from 1. Raises WorkError if a row cannot be read."""
    rows = check_kind(path)(path)
    for number in count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, number, error) from None
        yield number, row


def _unreadable(path: Path, number: int, error: Exception) -> WorkError:
    return WorkError(f"{path} cannot be read as text: row {number}: {type(error).__name__}: {error}")


def check_kind(path: Path) -> Callable[[Path], Iterator[Any]]:
    """Return the function that reads the rows of a file. Raises RequestError if it is of no known kind."""
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise RequestError(f"{path}: text files end in {', '.join(_READERS)}; got {path.suffix or 'no suffix'!r}")
    return reader


def _text_of(row: Any, tokenizer: Any) -> str:
    """Return the text of a row. Raises TypeError or ValueError if it has none."""
    if not isinstance(row, dict):
        raise TypeError(f"{type(row).__name__} instead of an object with one of {', '.join(_COLUMNS)}")
    if "text" in row:
        if not isinstance(row["text"], str):
            kind = "null" if row["text"] is None else type(row["text"]).__name__
            raise TypeError(f"its text is {kind}, not a string; leave the row out")
        return row["text"]
    messages = messages_of(row)
    if getattr(tokenizer, "chat_template", None) is None:
        if all(isinstance(row.get(key), str) for key in ("prompt", "completion")):
            return row["prompt"] + row["completion"]
        raise RequestError("it is a conversation, but the model has no chat template; give rows with a text")
    return written(tokenizer, messages)


def written(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return a conversation as text. Raises RequestError if the chat template does not take it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program
        raise RequestError(f"the chat template does not take this conversation: {first_line(error)}") from None


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a conversation as messages with role and content. Raises ValueError if it is none."""
    if isinstance(row.get("messages"), list):
        found = row["messages"]
    elif isinstance(row.get("conversations"), list):
        turns = [turn if isinstance(turn, dict) else {} for turn in row["conversations"]]
        found = [{"role": _ROLES.get(t.get("from", ""), t.get("from")), "content": t.get("value")} for t in turns]
    elif all(isinstance(row.get(key), str | list) for key in ("prompt", "completion")):
        pairs = (("user", row["prompt"]), ("assistant", row["completion"]))
        found = [
            m for role, said in pairs for m in (said if isinstance(said, list) else [{"role": role, "content": said}])
        ]
    else:
        raise ValueError(f"it has none of {', '.join(_COLUMNS)}, or null in their place; leave the row out")
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise ValueError(f"a message needs a role and a content; found {str(message)[:80]}")
    return found


def _txt(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        yield {"text": file.read(MOST_CHARACTERS)}


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
