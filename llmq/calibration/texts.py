"""Reads text for calibration and evaluation, and cuts it into token sequences of fixed length, without padding."""

import ast
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from llmq.calibration.text_files import MOST_CHARACTERS, check_kind, documents
from llmq.core.errors import RequestError, WorkError
from llmq.core.settings import Calibration

MORE = "more"  # the name of further windows of the calibration text, for `--tuned.end-text`
_HELD_OUT_EVERY = 10
CHARACTERS = 12  # in a token, at most: English text has four to five


@dataclass(frozen=True)
class Tokens:
    """Calibration sequences. Codes are computed from `train`; `held_out` measures, and decides between candidates."""

    train: Int64[Tensor, "train length"]
    held_out: Int64[Tensor, "held_out length"]


def windows(tokenizer: Any, settings: Calibration, more: int = 0) -> Int64[Tensor, "samples length"]:
    """Cut the text into `samples` equal stretches and draw one window at a seeded random position in each.

    If the tokenizer starts a text with a BOS token, every window starts with it: models react strongly to its absence.
    `more` samples are added, or fewer if the text is too short for them. Raises RequestError if it is too short for
    `samples`.
    """
    bos = _bos(tokenizer)
    length = settings.sequence_length - len(bos)
    needed, wanted = settings.samples * length, (settings.samples + more) * length
    # Remove the text's own BOS, because every window gets one.
    text = read_text(settings.text, enough_characters=CHARACTERS * wanted, tokenizer=tokenizer)
    tokens = tokenize(tokenizer, text)[len(bos) :]
    if len(tokens) < needed:
        raise RequestError(
            f"calibration text {settings.text!r} has {len(tokens)} tokens; {settings.samples} samples of "
            f"{length} tokens need {needed}.\nLower --samples or --sequence-length, or give more text."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    samples = min(settings.samples + more, len(tokens) // length)
    stretch = len(tokens) // samples
    starts = torch.arange(samples) * stretch + torch.randint(stretch - length + 1, (samples,), generator=generator)
    return torch.stack([torch.cat([bos, tokens[start : start + length]]) for start in starts.tolist()])


def hold_out(sequences: Int64[Tensor, "samples length"]) -> Tokens:
    """Hold out every tenth sequence, or the last one if there are two to nine."""
    held_out = torch.arange(len(sequences)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    if not held_out.any():
        held_out[1:][-1:] = True  # a single sequence stays in `train`
    return Tokens(sequences[~held_out], sequences[held_out])


def evaluation_chunks(
    tokenizer: Any, text: str, length: int, limit: int | None = None, bos: bool = True
) -> Int64[Tensor, "chunks length"]:
    """Cut the text into chunks that do not overlap, without a last partial one. Raises RequestError if it has none.

    `bos`: every chunk begins with the BOS token, if the tokenizer begins a text with it: models react strongly to its
    absence. False cuts the text with its one BOS, as published perplexities do.
    """
    first = _bos(tokenizer) if bos else torch.empty(0, dtype=torch.int64)
    width = length - len(first)
    enough = len(text) if limit is None else CHARACTERS * limit * length
    tokens = tokenize(tokenizer, text[:enough])[len(first) :]
    # The last word may be cut in two, so one token more is needed. A text of long tokens has less than a guess says.
    if limit is not None and enough < len(text) and len(tokens) <= limit * width:
        tokens = tokenize(tokenizer, text)[len(first) :]
    if chunks := len(tokens) // width:
        pieces = tokens[: chunks * width].view(chunks, width)[:limit]
        return torch.cat([first.expand(len(pieces), -1), pieces], 1)
    raise RequestError(f"the text has {len(tokens)} tokens, less than one chunk of {width}; lower --sequence-length")


def check_context(config: Any, sequence_length: int) -> None:
    """Raise RequestError if sequences are longer than the context of the model."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and 0 < longest < sequence_length:  # XLNet, which has no limit, says -1
        raise RequestError(f"sequence length {sequence_length} exceeds the model's context of {longest} tokens")


def check_tokens(model: Any, ids: Int64[Tensor, "*shape"]) -> None:
    """Raise RequestError if a token has no row in the embeddings of the model: the tokenizer is not its own."""
    known, largest = model.get_input_embeddings().num_embeddings, int(ids.max()) if ids.numel() else 0
    if largest >= known:
        raise RequestError(
            f"the tokenizer gives token {largest}, but the model has embeddings for {known} tokens only.\n"
            "Use the tokenizer that the model was trained with, or a text without its added tokens."
        )


def tokenize(tokenizer: Any, text: str) -> Int64[Tensor, "tokens"]:
    """Return the token ids of one long text. Raises RequestError if the text is empty."""
    if not text.strip():
        raise RequestError("the text is empty")
    # verbose=False: no warning that the text is longer than the model's context.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def check_text(name: str) -> None:
    """Raise RequestError if there is no text of this name."""
    if name == "self":
        raise RequestError("'self' is for calibration only; python -m llmq.write makes a file of such text")
    if name not in _TEXTS:
        path = Path(name).expanduser()
        if not path.is_file():
            raise RequestError(f"no such text: {str(path)!r} is neither a file nor one of {', '.join(_TEXTS)}")
        check_kind(path)


def read_text(
    name: str, enough_characters: int = MOST_CHARACTERS, evaluation: bool = False, tokenizer: Any = None
) -> str:
    """Return the text called `name`, or the start of it if it has many more than `enough_characters`.

    Args:
        name: wikitext2, c4, pile (through `datasets`), pydoc, pytopics (offline), or a .txt, .jsonl or .parquet file.
        evaluation: read the split for evaluation instead of the training split, if the data set has both.
        tokenizer: of the model; its chat template makes text of the conversations in a file.

    Raises RequestError if the name is unknown, WorkError if the text cannot be fetched or read.
    """
    check_text(name)
    read, size = list[str](), 0
    for document in _TEXTS[name](evaluation) if name in _TEXTS else documents(Path(name).expanduser(), tokenizer):
        read.append(document)
        size += len(document) + 2
        if size >= min(enough_characters, MOST_CHARACTERS):
            break
    return "\n\n".join(read)


def _bos(tokenizer: Any) -> Int64[Tensor, "bos"]:
    """Return the BOS token if the tokenizer starts a text with it, else no token."""
    first = tokenizer("a")["input_ids"][:1]
    return torch.tensor(first if first == [tokenizer.bos_token_id] else [], dtype=torch.int64)


def _pydoc(_evaluation: bool) -> Iterator[str]:
    """Yield the docstrings of CPython's standard library, in the order of file names."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a few files are deliberately not UTF-8 or not valid
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield from (doc for doc in docs if doc and len(doc) > 200)


def _pytopics(_evaluation: bool) -> Iterator[str]:
    """Yield the language reference of Python's `help()`. It has almost nothing in common with `pydoc`."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _wikitext2(evaluation: bool) -> Iterator[str]:
    # Joined with blank lines, the test split is the text of published perplexities.
    return _hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test" if evaluation else "train")


def _c4(evaluation: bool) -> Iterator[str]:
    return _hub_dataset("allenai/c4", "en", split="validation" if evaluation else "train", streaming=True)


def _pile(evaluation: bool) -> Iterator[str]:
    name = "mit-han-lab/pile-val-backup" if evaluation else "NeelNanda/pile-10k"
    return _hub_dataset(name, split="validation" if evaluation else "train")


def _hub_dataset(*name: str, **options: Any) -> Iterator[str]:
    """Yield the documents of a data set. Raises WorkError if it cannot be fetched."""
    from datasets import load_dataset

    try:
        yield from (row["text"] for row in load_dataset(*name, **options))  # type: ignore[index, call-overload]
    except Exception as error:  # its own errors, and those of fsspec, the hub and requests
        raise WorkError(
            f"the data set {name[0]} cannot be fetched ({type(error).__name__}).\n"
            "Check the connection, or use a text on this machine: --calibration pydoc, or a file"
        ) from error


_TEXTS: dict[str, Callable[[bool], Iterable[str]]]
_TEXTS = {"wikitext2": _wikitext2, "c4": _c4, "pile": _pile, "pydoc": _pydoc, "pytopics": _pytopics}
