"""Prepares a run: checks the request, opens the model, tokenizes the calibration text, finds earlier progress."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.algorithms import ALGORITHMS
from llmq.calibration.block_runner import Compute
from llmq.calibration.self_generated import SELF, sequences_by
from llmq.calibration.texts import MORE, Tokens, check_context, check_tokens, hold_out, windows
from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.output_dir import (
    PROGRESS,
    REPORT,
    check_output,
    holds_checkpoint,
    may_write_in,
    unfinished_work,
    write_json,
    written_whole,
)
from llmq.core.config import QuantizeConfig
from llmq.core.device import product_dtype
from llmq.core.distributed import Ranks
from llmq.core.errors import CheckpointError, RequestError
from llmq.core.format_limits import fits_gptq
from llmq.core.settings import Calibration
from llmq.core.timing import Clock
from llmq.models.gguf_converter import check_converter, check_metadata, refuse_code
from llmq.models.model_source import ModelSource
from llmq.models.stock_loading import unreadable
from llmq.models.untrusted_files import read_json
from llmq.run.fingerprint import differences, fingerprint, told_differences
from llmq.run.journal import Step, read_journal
from llmq.run.report_plot import check_plot

FINGERPRINT = "fingerprint"  # key of the report: what the checkpoint depends on


@dataclass(frozen=True)
class Request:
    """A checked request, with everything that a run needs to begin."""

    config: QuantizeConfig
    source: ModelSource  # the model; its weights are read when they are needed
    compute: Compute
    ranks: Ranks
    clock: Clock
    progress: bool  # show a progress bar
    tokens: Tokens  # the calibration text
    training: Tokens  # the text that the whole model is trained on in the end
    fingerprint: dict[str, Any]
    steps: list[Step]  # the steps that earlier processes finished
    is_met: bool  # whether the finished checkpoint is there already

    def keep_tokens(self) -> None:
        """Store text that the model wrote, so that a resumed run need not write it again."""
        path = _tokens_file(self.config.output)
        if self.ranks.is_first and _is_self_written(self.config) and not path.exists():
            tensors = {"train": self.tokens.train, "held_out": self.tokens.held_out, "training": self.training.train}
            with written_whole(path) as new:
                save_file(tensors, new)


def open_request(config: QuantizeConfig, device: torch.device, ranks: Ranks, progress: bool) -> Request:
    """Prepare a run. Raises RequestError if the request cannot be met, or if the output directory is in use."""
    clock = Clock()
    if config.plot:
        check_plot()
    if config.offload_dir is not None:
        _check_offload(config.offload_dir)
    if ranks.is_first:
        check_output(config.output, config.overwrite, config.resume)
    if ranks.size > 1 and config.method == "tuned":
        raise RequestError("method tuned trains in one process; start it without a launcher")
    with clock("open"):
        source = ModelSource(config.source, config.trust_remote_code)
        if source.directory.resolve() == config.output.resolve():
            raise RequestError("the output directory is the model's own; choose another")
        compute = compute_for(source, device, config.method == "tuned")
    config = _with_format(config, source)
    tokens, training = ranks.first(lambda: _Text(config, source, compute, clock, progress).tokens())
    identity = fingerprint(config, source, tokens, training, compute)
    steps, is_met = ranks.first(lambda: _earlier(config, identity) if config.resume else ([], False))
    return Request(config, source, compute, ranks, clock, progress, tokens, training, identity, steps, is_met)


def _with_format(config: QuantizeConfig, source: ModelSource) -> QuantizeConfig:
    """Choose a format for models that transformers does not open as compressed-tensors.

    Raises RequestError if the request chose that one, or GGUF for a model that llama.cpp's converter does not know.
    """
    if config.stored_as == "gguf":
        _check_gguf(config, source)
    if config.stored_as != "compressed-tensors":
        return config
    fault = unreadable(source.skeleton, source.files, lambda _: config.symmetric)
    is_free = config.spending is not None and not config.widths  # a budget then chooses from what gptq stores
    asked = tuple(config.other_bits.values()) if is_free else config.all_bits
    if fault and (config.format != "auto" or not fits_gptq(asked)):
        raise RequestError(fault)
    return replace(config, format="gptq") if fault else config


def _check_gguf(config: QuantizeConfig, source: ModelSource) -> None:
    """Raise RequestError if llama.cpp's converter does not know the model or its tokenizer: no hours go into it."""
    check_converter((companions := companions_of(source)).config)
    with TemporaryDirectory() as name:
        companions.write(directory := Path(name))
        write_json(directory / "config.json", companions.config)
        if not config.trust_remote_code:
            refuse_code(directory)
        check_metadata(directory, config.model)


def _check_offload(directory: Path) -> None:
    """Raise RequestError unless hidden states can be written there. Writes nothing itself."""
    if not may_write_in(directory):
        raise RequestError(f"hidden states cannot wait in {directory}: it is not a directory that llmq may write to")


def compute_for(source: ModelSource, device: torch.device, trains: bool) -> Compute:
    """Return how to compute: in float32, where nothing overflows, with bfloat16 products if the device is fast at them.

    On a GPU, where memory is scarce, models of 16 bits compute in their own dtype, as they do when they are served. One
    of float16 that is to be trained does not: its gradients would be rounded to zero.
    """
    own = source.dtype == torch.bfloat16 or (source.dtype == torch.float16 and not trains)
    return Compute(device, source.dtype if device.type != "cpu" and own else torch.float32, product_dtype(device))


def whole_model(config: QuantizeConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the original model with all its weights. It shares nothing with the run's skeleton: `del` frees all."""
    return ModelSource(config.source, config.trust_remote_code).load_all(device, dtype).requires_grad_(False)


def _earlier(config: QuantizeConfig, identity: dict[str, Any]) -> tuple[list[Step], bool]:
    """Return the steps of this request that earlier processes finished, and whether the whole checkpoint is there.

    Raises RequestError if the directory holds the result of another request.
    """
    output, steps, is_met = config.output, list[Step](), False
    if unfinished_work(output).is_dir():
        before, steps = read_journal(output / PROGRESS)
        if not before:  # the run was killed before it wrote anything down
            return [], False
    elif (output / REPORT).exists() and holds_checkpoint(output):
        is_met = True
        try:
            before = read_json(output, REPORT).get(FINGERPRINT)
        except CheckpointError as error:
            raise RequestError(f"{error}; nothing to resume there. --overwrite begins anew") from None
        if not before:
            raise RequestError(
                f"{output} holds a checkpoint without a record of its settings, so it cannot be resumed; "
                "--overwrite replaces it"
            )
    else:
        return [], False
    if differing := differences(before, identity):
        raise RequestError(told_differences(output, differing))
    return steps, is_met


def _is_self_written(config: QuantizeConfig) -> bool:
    """Return whether the model writes the text, or some of it."""
    texts = (config.calibration, config.tuned.end_text if config.end_to_end else "")
    return ALGORITHMS[config.method].needs_statistics(config) and SELF in texts


def _tokens_file(output: Path) -> Path:
    return unfinished_work(output) / "tokens.safetensors"


@dataclass(frozen=True)
class _Text:
    """Gets the token ids that a run needs from where the request says."""

    config: QuantizeConfig
    source: ModelSource
    compute: Compute
    clock: Clock
    progress: bool

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Return the tokens to calibrate on, and those to train on from end to end.

        The latter are the former and some more. The same held-out ones judge both.
        """
        config = self.config
        if not ALGORITHMS[config.method].needs_statistics(config):
            return self._placeholder()
        check_context(self.source.config, config.sequence_length)
        if config.resume and _is_self_written(config) and _tokens_file(config.output).exists():
            return self._kept()
        settings, tuned = config.calibration_settings, config.tuned
        wanted = tuned.end_samples if config.end_to_end else 0
        # Windows of one text are drawn in one go, so that no two overlap.
        drawn = self._sequences(settings, wanted if tuned.end_text == MORE else 0)
        spread = torch.linspace(0, len(drawn) - 1, settings.samples).round().long()
        tokens, others = hold_out(drawn[spread]), drawn[torch.isin(torch.arange(len(drawn)), spread, invert=True)]
        if wanted and tuned.end_text != MORE:
            others = self._sequences(replace(settings, text=tuned.end_text, samples=wanted, seed=settings.seed + 1))
        return tokens, replace(tokens, train=torch.cat([tokens.train, others]))

    def _placeholder(self) -> tuple[Tokens, Tokens]:
        """Return one short sequence. It only shows which linears share an input; its values do not matter."""
        ids = torch.arange(16)[None] % self.source.config.get_text_config().vocab_size
        tokens = Tokens(ids, ids[:0])
        return tokens, tokens

    def _kept(self) -> tuple[Tokens, Tokens]:
        kept = load_file(_tokens_file(self.config.output))
        tokens = Tokens(kept["train"], kept["held_out"])
        return tokens, replace(tokens, train=kept["training"])

    def _sequences(self, settings: Calibration, more: int = 0) -> Int64[Tensor, "samples length"]:
        """Return sequences of one text. `more`: how many further ones to draw, if the text is long enough."""
        if settings.text != SELF:
            with self.clock("open"):
                ids = windows(self.source.tokenizer, settings, more)
                check_tokens(self.source.skeleton, ids)
                return ids
        settings = replace(settings, samples=settings.samples + more)
        if self.config.dry_run:  # only the size of the text matters
            return torch.zeros(settings.samples, settings.sequence_length, dtype=torch.int64)
        with self.clock("sample"):
            source = ModelSource(self.config.source, self.config.trust_remote_code)  # not the skeleton of the run
            return sequences_by(source, settings, self.compute, self.progress)
