"""Text for calibration and evaluation, and how it becomes fixed-length token sequences (no padding anywhere)."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from llmq.core.errors import RequestError, WorkError
from llmq.core.settings import Calibration

MORE = "more"
"""Other windows of the calibration text."""
_HELD_OUT_EVERY = 10
# Enough text for any calibration; tokenizing all of a large file would only take time.
_MAX_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class Tokens:
    """Calibration sequences; codes come from `train`, the held-out tenth measures and decides between candidates."""

    train: Int64[Tensor, "train length"]
    held_out: Int64[Tensor, "held_out length"]


def windows(tokenizer: Any, settings: Calibration, more: int = 0) -> Int64[Tensor, "samples length"]:
    """Windows spread evenly over the text: one at a seeded random place in each of `samples` equal stretches.

    Args:
        more: so many further samples, or as many as the text has room for.

    If the tokenizer starts a text with a BOS token, so does every window: models react strongly to its absence.
    Raises RequestError if the text is too short, saying how many tokens it has and how many are needed.
    """
    bos = _bos(tokenizer)
    length = settings.sequence_length - len(bos)
    needed, wanted = settings.samples * length, (settings.samples + more) * length
    # The text's own BOS goes: its first window gets one like all others.
    tokens = tokenize(tokenizer, read_text(settings.text, enough_characters=12 * wanted))[len(bos) :]
    if len(tokens) < needed:
        raise RequestError(
            f"calibration text {settings.text!r} has {len(tokens)} tokens; {settings.samples} samples of "
            f"{length} tokens need {needed}.\nLower --samples or --sequence-length, or give more text."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    samples = min(settings.samples + more, len(tokens) // length)
    stretch = len(tokens) // samples
    jitter = torch.randint(stretch - length + 1, (samples,), generator=generator)
    starts = torch.arange(samples) * stretch + jitter
    return torch.stack([torch.cat([bos, tokens[start : start + length]]) for start in starts.tolist()])


def hold_out(sequences: Int64[Tensor, "samples length"]) -> Tokens:
    """Every tenth sequence is held out."""
    held_out = torch.arange(len(sequences)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    if not held_out.any():
        held_out[1:][-1:] = True  # the last of a few; a single sample must serve both ends
    return Tokens(sequences[~held_out], sequences[held_out])


def evaluation_chunks(
    tokenizer: Any, text: str, length: int, limit: int | None = None
) -> Int64[Tensor, "chunks length"]:
    """The text tokenized in one go and cut into non-overlapping chunks, the last partial one dropped.

    Raises RequestError if there is not a single full chunk.
    """
    tokens = tokenize(tokenizer, text)
    chunks = len(tokens) // length
    if chunks == 0:
        raise RequestError(
            f"the text has {len(tokens)} tokens, less than one chunk of {length}; lower --sequence-length"
        )
    return tokens[: chunks * length].view(chunks, length)[:limit]


def check_context(config: Any, sequence_length: int) -> None:
    """Raise RequestError if the model was not made for sequences this long."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise RequestError(f"sequence length {sequence_length} exceeds the model's context of {longest} tokens")


def tokenize(tokenizer: Any, text: str) -> Int64[Tensor, "tokens"]:
    """Token ids as the tokenizer gives them for one long text. Raises RequestError for an empty one."""
    if not text.strip():
        raise RequestError("the text is empty")
    # verbose=False: that the text is longer than the model's context is intended.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def read_text(name: str, enough_characters: int = _MAX_CHARACTERS, evaluation: bool = False) -> str:
    """The text called `name`, cut off after `enough_characters` where it is much longer.

    Names: wikitext2, c4, pile (through `datasets`), pydoc, pytopics (offline), or a .txt, .jsonl or .parquet file.
    Data sets that come in splits give the training one, or the one for `evaluation`.
    No silent fallback: what cannot be had is a RequestError (unknown) or WorkError (not reachable).
    """
    if name in _TEXTS:
        documents = _TEXTS[name](evaluation)
    else:
        documents = _file_documents(Path(name).expanduser())
    limit = min(enough_characters, _MAX_CHARACTERS)
    return _joined(documents, limit)


def _joined(documents: Iterable[str], limit: int) -> str:
    kept: list[str] = []
    size = 0
    for document in documents:
        kept.append(document)
        size += len(document) + 2
        if size >= limit:
            break
    return "\n\n".join(kept)


def _bos(tokenizer: Any) -> Int64[Tensor, "bos"]:
    first = tokenizer("a")["input_ids"][:1]
    starts = bool(first) and first[0] == tokenizer.bos_token_id
    return torch.tensor(first if starts else [], dtype=torch.int64)


def _pydoc(_evaluation: bool) -> Iterator[str]:
    """Docstrings of CPython's standard library, in the order of file names."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(inside):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a few files are deliberately not UTF-8 or not valid
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield from (doc for doc in docs if doc and len(doc) > 200)


def _pytopics(_evaluation: bool) -> Iterator[str]:
    """The language reference behind Python's `help()`: a text that shares next to nothing with `pydoc`."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _wikitext2(evaluation: bool) -> Iterator[str]:
    # Joined with blank lines, the test split is the string everybody reports perplexity on.
    return _hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test" if evaluation else "train")


def _c4(evaluation: bool) -> Iterator[str]:
    return _hub_dataset("allenai/c4", "en", split="validation" if evaluation else "train", streaming=True)


def _pile(evaluation: bool) -> Iterator[str]:
    name = "mit-han-lab/pile-val-backup" if evaluation else "NeelNanda/pile-10k"
    return _hub_dataset(name, split="validation" if evaluation else "train")


def _hub_dataset(*name: str, **options: Any) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(*name, **options)
        yield from (row["text"] for row in rows)  # type: ignore[index, call-overload]
    except Exception as error:  # datasets raises its own, fsspec's, the hub's and requests' errors alike
        raise WorkError(
            f"the data set {name[0]} cannot be fetched ({type(error).__name__}).\n"
            "Check the connection, or calibrate on a text that is here: --calibration pydoc, or a file"
        ) from error


_TEXTS: dict[str, Callable[[bool], Iterable[str]]] = {
    "wikitext2": _wikitext2,
    "c4": _c4,
    "pile": _pile,
    "pydoc": _pydoc,
    "pytopics": _pytopics,
}


def _file_documents(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise RequestError(f"no such text: {str(path)!r} is neither a file nor one of {', '.join(_TEXTS)}, self")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise RequestError(f"{path}: text files end in {', '.join(_READERS)}; got {path.suffix or 'no suffix'!r}")
    try:
        for document in reader(path):
            if not isinstance(document, str):
                raise TypeError(f"a text is {type(document).__name__}, not a string")
            yield document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{path} cannot be read as text: {type(error).__name__}: {error}") from None


def _txt(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield file.read(_MAX_CHARACTERS)


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line)["text"] for line in file if line.strip())


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
        yield from batch.column("text").to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
