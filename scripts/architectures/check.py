"""What must hold for one tiny model, and whether it does.

source --llmq--> packed --llmq.load--> logits --+
  |                 +-----transformers----> logits --+-- all three must agree
  +-- its files with the dequantized weights --> logits --+
"""

from __future__ import annotations

import json
import re
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, CompressedTensorsConfig

import llmq
from architectures.dense import dequantized, round_experts
from architectures.sizes import NOT_BUILT
from architectures.tiny_models import has_experts, save_tiny, some_tokens, text
from llmq.checkpoint.output_dir import REPORT
from llmq.core.errors import LlmqError, first_line

Row = dict[str, Any]

METHODS = ("rtn", "gptq")
LARGEST_RATIO = 1.3  # of gptq's error to rtn's; with 8 short texts and random weights it may be a little above 1
_TOLERANCE = 1e-5  # relative difference of logits. Sums in another order: 3e-7 with GPT-BigCode; otherwise 0
_DEQUANTIZED = 2e-3  # transformers' dequantize=True rounds the weights: Llama 5e-4, Mamba 7e-4
_NEW_TOKENS = 4


class FailedError(Exception):
    """A check that did not hold, in the words of the results."""


@dataclass(frozen=True)
class Made:
    """A tiny model in memory and on disk, and the tokens to compare on."""

    name: str
    room: Path
    model: Any
    ids: Tensor

    def load(self, directory: Path, **options: Any) -> Any:
        """Load a directory with transformers, in the model's own class."""
        return type(self.model).from_pretrained(directory, dtype=torch.float32, **options).eval()


def checked(name: str, room: Path, methods: tuple[str, ...] = METHODS) -> Row:
    """Return what was found for a model type: `result`, and numbers as far as there are some."""
    row: Row = {"name": name, "class": "", "experts": None, "share": None, "remark": ""}
    started = time.process_time()
    try:
        made = _make(name, room, row)
        for method in methods:
            _check_method(made, method, row)
        row["result"] = "ok"
        if stock := row.pop("stock", ""):
            row["result"] = f"ok in llmq, stock transformers fails: {stock}"
    except FailedError as failure:
        row["result"] = str(failure)
    row.pop("stock", "")
    return row | {"seconds": round(time.process_time() - started, 1)}


def _make(name: str, room: Path, row: Row) -> Made:
    """Build and save the model. Raises FailedError if it is none, or if transformers does not load what it saved."""
    if name in NOT_BUILT:
        raise FailedError(f"not built: {NOT_BUILT[name]}")
    try:
        model = save_tiny(name, room / "source")
        row |= {"class": type(model).__name__, "experts": has_experts(model)}
        made = Made(name, room, model, some_tokens(room / "source"))
        difference = relative(logits(made.load(room / "source"), made.ids), logits(model, made.ids))
    except Exception as error:
        raise FailedError(f"not built: {_words(error)}") from None
    if not difference <= _TOLERANCE:
        raise FailedError(f"not built: transformers loads what it saved with other logits ({difference:.0e})")
    (room / "text.txt").write_text(text(0))
    return made


def _check_method(made: Made, method: str, row: Row) -> None:
    """Quantize by one method, and compare every way to run the result with the dense model of the same weights."""
    output = made.room / method
    try:
        llmq.quantize(
            llmq.QuantizeConfig(
                model=str(made.room / "source"),
                output=output,
                method=method,
                group_size=32,
                calibration=str(made.room / "text.txt"),
                samples=8,
                sequence_length=48,
                device="cpu",
            )
        )
    except LlmqError as error:
        is_ours = str(output) in str(error)  # it was at work on the output, and its own check failed
        raise FailedError(f"{'crash' if is_ours else 'refused'}: {_words(error)}") from None
    except Exception as error:
        raise FailedError(f"crash: {method}: {_words(error)}") from None
    report = json.loads((output / REPORT).read_text())
    row |= {"share": report["packed_share"], "remark": _remark(report["notes"])}
    dense = dequantized(made.model, made.room, output)
    expected = logits(dense, made.ids)
    row[f"{method}_error"] = relative(expected, logits(made.model, made.ids))
    _check_llmq(made, dense, expected, output)
    row["stock"] = row.get("stock") or _stock_failure(made, output, expected, dense)
    if row["stock"]:
        _check_plugin(made, expected, output)


def _check_llmq(made: Made, dense: Any, expected: Tensor, output: Path) -> None:
    """Raise FailedError unless llmq loads its checkpoint, with the right logits, and generates the right tokens."""
    prompt = made.ids[:, :8]
    settings: Row = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False}
    step = "llmq.load"
    try:
        packed = llmq.load(output, "cpu", torch.float32)
        step = "forward"
        difference = relative(logits(packed, made.ids), expected)
        if not difference <= _TOLERANCE:
            raise FailedError(f"wrong numbers: logits differ by {difference:.0e}")
        tokens = _generated(dense, prompt, settings)
        if tokens is not None:
            step = "generate"
            mine = packed.generate(prompt, **settings)
            step = "fast_generate"
            fast = llmq.fast_generate(packed, prompt, **settings).sequences
            if not (torch.equal(mine, tokens) and torch.equal(fast, tokens)):
                raise FailedError("wrong numbers: it generates other tokens than the dense model")
    except FailedError:
        raise
    except Exception as error:
        raise FailedError(f"crash: {step}: {_words(error)}") from None


def _generated(dense: Any, prompt: Tensor, settings: Row) -> Tensor | None:
    """Return what the dense model writes, None if transformers cannot generate with this class at all."""
    try:
        return dense.generate(prompt, **settings)
    except Exception:
        return None


def _stock_failure(made: Made, output: Path, expected: Tensor, dense: Any) -> str:
    """Return why stock transformers does not run the checkpoint; "" if it does. Raises FailedError for wrong logits.

    `dense`: the model whose logits are expected; its experts may become float16.
    """
    lost: list[str] = []
    try:
        model, notes = type(made.model).from_pretrained(output, dtype=torch.float32, output_loading_info=True)
        lost = sorted(notes["missing_keys"])
        difference = relative(logits(model.eval(), made.ids), expected)
        if difference > _TOLERANCE and round_experts(dense, model):
            difference = relative(logits(model, made.ids), logits(dense, made.ids))
    except Exception as error:  # transformers fails in its own ways
        return f"it finds no {lost[0]}" if lost else _words(error) + _way_out(made, output, expected)
    if difference <= _TOLERANCE:
        return ""
    if lost:
        return f"it finds no {lost[0]}"
    raise FailedError(f"wrong numbers: in stock transformers logits differ by {difference:.0e}")


def _check_plugin(made: Made, expected: Tensor, output: Path) -> None:
    """Raise FailedError unless transformers opens the checkpoint with llmq as its quantization method."""
    config = AutoConfig.from_pretrained(output)
    config.quantization_config = {"quant_method": "llmq"}
    try:
        difference = relative(logits(made.load(output, config=config), made.ids), expected)
    except Exception as error:
        raise FailedError(f"crash: transformers with quant_method llmq: {_words(error)}") from None
    if not difference <= _TOLERANCE:
        raise FailedError(f"wrong numbers: transformers with quant_method llmq: logits differ by {difference:.0e}")


def _way_out(made: Made, output: Path, expected: Tensor) -> str:
    """Return what to say if transformers can load the checkpoint once it unpacks the weights at once."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made.load(output, quantization_config=CompressedTensorsConfig(dequantize=True))
        if relative(logits(model, made.ids), expected) <= _DEQUANTIZED:
            return " (CompressedTensorsConfig(dequantize=True) helps)"
    return ""


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a forward pass without a cache."""
    return model(input_ids=ids, use_cache=False).logits


def relative(one: Tensor, other: Tensor) -> float:
    """Return how far two tensors are apart, as a share; NaN if one holds NaN."""
    return float((one - other).norm() / other.norm())


def _words(error: Exception) -> str:
    """Return an error as one short line, without the names of temporary directories."""
    kind = "" if isinstance(error, LlmqError) else f"{type(error).__name__}: "
    return re.sub(r"\S*/(source|dense|rtn|gptq)\b", r"\1", f"{kind}{first_line(error)}".replace("|", "/"))[:220]


def _remark(notes: list[dict[str, str]]) -> str:
    """Return the notes of a run, those of equal words once: blocks differ only by their numbers."""
    lines = dict.fromkeys(re.sub(r"\.\d+(?=[.:])", ".N", f"{note['where']}: {note['note']}") for note in notes)
    return "; ".join(lines).replace("|", "/")[:300]
