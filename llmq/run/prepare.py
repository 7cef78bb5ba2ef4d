"""A quantization before it begins: the model opened, the text drawn, and what an earlier process left of it found."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmq.algorithms import ALGORITHMS
from llmq.calibration.block_runner import Compute
from llmq.calibration.self_generated import SELF, sample_sequences
from llmq.calibration.texts import MORE, Tokens, check_context, hold_out, windows
from llmq.checkpoint.output_dir import PROGRESS, REPORT, check_output, existing_parent, unfinished_work, written_whole
from llmq.core.config import QuantizeConfig
from llmq.core.device import multiplies_bfloat16
from llmq.core.distributed import Ranks
from llmq.core.errors import CheckpointError, RequestError
from llmq.core.memory import free_memory, release_memory
from llmq.core.settings import Calibration, Tuned
from llmq.core.timing import Clock
from llmq.models.model_source import ModelSource
from llmq.models.untrusted_files import read_json
from llmq.run.fingerprint import differences, fingerprint
from llmq.run.journal import Step, read_journal
from llmq.run.report_plot import check_plot

FINGERPRINT = "fingerprint"
"""Entry of the report that says what the checkpoint depends on."""


@dataclass(frozen=True)
class Request:
    """What is asked for, with what it takes to do it."""

    config: QuantizeConfig
    source: ModelSource
    compute: Compute
    ranks: Ranks
    clock: Clock
    progress: bool
    """Show a progress bar."""
    tokens: Tokens
    training: Tokens
    """What the whole model is trained on in the end."""
    fingerprint: dict[str, Any]
    steps: list[Step]
    """What earlier processes finished of it."""
    is_met: bool
    """The checkpoint is already there."""

    def keep_tokens(self) -> None:
        """Text that the model wrote is not written again by a process that goes on."""
        path = _kept_tokens(self.config.output)
        if self.ranks.is_first and _is_written(self.config) and not path.exists():
            tensors = {"train": self.tokens.train, "held_out": self.tokens.held_out, "training": self.training.train}
            with written_whole(path) as new:
                save_file(tensors, new)


def _check_offload(directory: Path) -> None:
    """Raise RequestError unless hidden states can wait there, as far as one can tell without writing."""
    try:
        there = existing_parent(directory)
        fits = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:
        fits = False
    if not fits:
        raise RequestError(f"hidden states cannot wait in {directory}: no directory that may be written to")


def open_request(config: QuantizeConfig, device: torch.device, ranks: Ranks, progress: bool) -> Request:
    """Raises RequestError for what cannot be asked for, also of an output directory where something else lies."""
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
        source = ModelSource(config.model, config.trust_remote_code)
        if source.directory.resolve() == config.output.resolve():
            raise RequestError("the output directory is the model's own; choose another")
        compute = compute_for(source, device)
        if config.end_to_end and not config.dry_run:  # which says all that is needed, not only this
            check_training_memory(source.skeleton, source.blocks, config.tuned, compute)
    tokens, training = ranks.first(lambda: _tokens(source, config, compute, clock, progress))
    identity = fingerprint(config, source, tokens, training, compute)
    steps, is_met = ranks.first(lambda: _earlier(config, identity) if config.resume else ([], False))
    return Request(config, source, compute, ranks, clock, progress, tokens, training, identity, steps, is_met)


def _earlier(config: QuantizeConfig, identity: dict[str, Any]) -> tuple[list[Step], bool]:
    """What an earlier process finished of this request, and whether that is all of it.

    Raises RequestError if it was asked for something else.
    """
    if unfinished_work(config.output).is_dir():
        before, steps = read_journal(config.output / PROGRESS)
        is_met = False
    elif (config.output / REPORT).exists() and (config.output / "config.json").exists():
        try:
            before, steps, is_met = read_json(config.output, REPORT).get(FINGERPRINT), [], True
        except CheckpointError as error:
            raise RequestError(f"{error}; nothing to resume there. --overwrite begins anew") from None
    else:
        return [], False
    if not before and is_met:
        raise RequestError(
            f"{config.output} holds a checkpoint that says not what it was made of; --overwrite replaces it"
        )
    if not before:  # killed before anything was written down
        return [], False
    if found := differences(before, identity):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RequestError(
            f"{config.output} holds another run, which this one cannot go on with: {found[0]}{more}.\n"
            "Repeat its request, or begin anew with --overwrite."
        )
    return steps, is_met


def check_training_memory(model: nn.Module, blocks: list[nn.Module], settings: Tuned, compute: Compute) -> None:
    """Raise RequestError if there is no room to train this model, which may be a mere skeleton, of these blocks."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    inside = (module for block in blocks for module in block.modules())
    linears = sum(module.weight.numel() for module in inside if isinstance(module, nn.Linear))
    original, rest = whole * compute.dtype.itemsize, (whole - linears) * 4
    needed = original + rest + linears * (20 if settings.end_rate else 8)
    free = free_memory(compute.device)
    if free is not None and needed > free:
        less = "--tuned.end-rate 0 leaves the codes as they are, in less than half; " if settings.end_rate else ""
        raise RequestError(
            f"training the whole model takes more than {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free.\n"
            f"{less}--tuned.end-steps 0 --tuned.steps 100 trains one block after the other."
        )


def compute_for(source: ModelSource, device: torch.device) -> Compute:
    """float32, in which nothing overflows, but products in bfloat16 where the device is made for them.

    bfloat16 models stay bfloat16 on a GPU, whose memory is dear.
    """
    precision = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    dtype = torch.bfloat16 if device.type == "cuda" and source.dtype == torch.bfloat16 else torch.float32
    return Compute(device, dtype, precision)


def whole_model(config: QuantizeConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The original, ready to run, in a skeleton of its own that is gone with it."""
    return ModelSource(config.model, config.trust_remote_code).load_all(device, dtype).requires_grad_(False)


def _is_written(config: QuantizeConfig) -> bool:
    """Whether the model writes (some of) the text."""
    return ALGORITHMS[config.method].needs_statistics(config) and SELF in (
        config.calibration,
        config.tuned.end_text if config.end_to_end else "",
    )


def _kept_tokens(output: Path) -> Path:
    return unfinished_work(output) / "tokens.safetensors"


def _tokens(
    source: ModelSource, config: QuantizeConfig, compute: Compute, clock: Clock, progress: bool
) -> tuple[Tokens, Tokens]:
    """What to calibrate on, and what to train on from end to end: that and some more, judged by the same."""
    if not ALGORITHMS[config.method].needs_statistics(config):
        # Only to see which linears share an input; the values do not matter.
        ids = torch.arange(16)[None] % source.config.get_text_config().vocab_size
        few = Tokens(ids, ids[:0])
        return few, few
    check_context(source.config, config.sequence_length)
    if config.resume and _is_written(config) and _kept_tokens(config.output).exists():
        kept = load_file(_kept_tokens(config.output))
        tokens = Tokens(kept["train"], kept["held_out"])
        return tokens, replace(tokens, train=kept["training"])

    def sequences(settings: Calibration, more: int = 0) -> Int64[Tensor, "samples length"]:
        if settings.text != SELF:
            with clock("open"):
                return windows(source.tokenizer, settings, more)
        if config.dry_run:  # how long the text is will do
            return torch.zeros(settings.samples + more, settings.sequence_length, dtype=torch.int64)
        with clock("sample"):
            whole = whole_model(config, compute.device, compute.precision)
            enough = replace(settings, samples=settings.samples + more)
            written = sample_sequences(whole, source.tokenizer.bos_token_id, enough, progress)
            del whole
            release_memory()
            return written

    settings, tuned = config.calibration_settings, config.tuned
    wanted = tuned.end_samples if config.end_to_end else 0
    drawn = sequences(settings, wanted if tuned.end_text == MORE else 0)  # at once, so that no two overlap
    spread = torch.linspace(0, len(drawn) - 1, settings.samples).round().long()
    tokens, others = hold_out(drawn[spread]), drawn[torch.isin(torch.arange(len(drawn)), spread, invert=True)]
    if wanted and tuned.end_text != MORE:
        others = sequences(replace(settings, text=tuned.end_text, samples=wanted, seed=settings.seed + 1))
    return tokens, replace(tokens, train=torch.cat([tokens.train, others]))
