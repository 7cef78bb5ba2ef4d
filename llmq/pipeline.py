"""The main road: source -> stream of blocks -> algorithm -> QuantizedWeight -> format -> checkpoint on disk."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from llmq.algorithms import ALGORITHMS
from llmq.block import Compute
from llmq.blockwise import Run
from llmq.check import DIGESTS, check
from llmq.checkpoint import Checkpoint
from llmq.clock import Clock
from llmq.companions import companions_of
from llmq.config import QuantizeConfig
from llmq.data import MORE, Tokens, check_context, split, windows
from llmq.device import multiplies_bfloat16, pick_device
from llmq.digest import digests_of
from llmq.distill import Student, check_memory, distill
from llmq.errors import RequestError, WorkError
from llmq.memory import release_memory
from llmq.sample import SELF, sample_sequences
from llmq.settings import Calibration
from llmq.source import ModelSource
from llmq.stream import stream
from llmq.writer import Writer, check_output


def quantize(config: QuantizeConfig, progress: bool = False) -> Path:
    """Quantize a model and write a packed checkpoint; returns its directory.

    Args:
        progress: show a progress bar and the table of the worst layers on stderr.

    Raises RequestError before any work for what cannot be asked for, WorkError for what fails on the way;
    in both cases nothing that looks like a checkpoint is left in the output directory.
    """
    check_output(config.output, config.overwrite)
    clock = Clock()
    with clock("open"):
        source = ModelSource(config.model, config.trust_remote_code)
        if source.directory.resolve() == config.output.resolve():
            raise RequestError("the output directory is the model's own; choose another")
        device = pick_device(config.device)
        if config.end_to_end:
            check_memory(source.skeleton, source.blocks, config.tuned, compute_for(source, device))
    tokens, training = _tokens(source, config, device, clock, progress)
    run = Run(config, source, device, clock)
    with torch.no_grad(), Writer(config.output, config.overwrite) as writer:
        if config.end_to_end:
            with writer.workroom() as directory:
                with Writer(directory) as first:
                    _block_by_block(run, tokens, first, progress)
                _end_to_end(run, training, directory, writer, progress)
        else:
            _block_by_block(run, tokens, writer, progress)
    if progress:
        run.report.show(clock, config.output)
    return config.output


def _block_by_block(run: Run, tokens: Tokens, writer: Writer, progress: bool) -> None:
    """Quantize all blocks, of which only one is in memory at a time."""
    source, clock = run.source, run.clock
    with clock("write"):
        for name in source.outer_names():
            writer.put(run.unchanged({name: source.read(name)}))
    blocks = stream(source, tokens, compute_for(source, run.device), clock, keep_original=run.matching)
    bar = tqdm(blocks, "blocks", total=len(source.block_names), disable=not progress, unit="block")
    for block in bar:
        tensors = run.quantize_block(block, lambda text: bar.set_postfix_str(text))
        with clock("write"):
            writer.put(tensors)
    _finish(run, writer)


def _end_to_end(run: Run, tokens: Tokens, directory: Path, writer: Writer, progress: bool) -> None:
    """Train the whole checkpoint in `directory`, and write it as the result."""
    config, compute = run.config, compute_for(run.source, run.device)
    with run.clock("distill"):
        release_memory()
        try:
            original = _whole_model(config, device=compute.device, dtype=compute.dtype)
            student = Student(directory, original, compute, config.trust_remote_code)
            changed, run.report.distilled = distill(student, original, tokens, config.tuned, compute, progress)
        except torch.OutOfMemoryError:
            raise WorkError(
                "training the whole model does not fit into the GPU's memory.\n"
                "--tuned.end-rate 0 (the default) and --tuned.end-batch 1 need less; "
                "--tuned.end-steps 0 --tuned.steps 100 trains one block after the other"
            ) from None
    checkpoint = Checkpoint(directory)
    files, run.digests = checkpoint.files, digests_of(checkpoint, changed)
    with run.clock("write"):
        # Tensors of one module stay together.
        for _, names in groupby(sorted(files.names()), key=lambda name: name.rpartition(".")[0]):
            writer.put({name: changed[name] if name in changed else files.read(name) for name in names})
    _finish(run, writer)


def _finish(run: Run, writer: Writer) -> None:
    with run.clock("write"):
        writer.flush()

    def read_back(directory: Path) -> None:
        with run.clock("check"):
            check(directory, run.digests, run.config.trust_remote_code)

    def report() -> dict[str, Any]:
        return run.report.to_json(run.clock) | {DIGESTS: run.digests}

    writer.finish(companions_of(run.source), run.source.dtype, run.hf_config(), report, read_back)


def _whole_model(config: QuantizeConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The original, ready to run, in a skeleton of its own that is gone with it."""
    return ModelSource(config.model, config.trust_remote_code).load_all(device, dtype).requires_grad_(False)


def compute_for(source: ModelSource, device: torch.device) -> Compute:
    """float32, in which nothing overflows, but products in bfloat16 where the device is made for them.

    bfloat16 models stay bfloat16 on a GPU, whose memory is dear.
    """
    precision = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    dtype = torch.bfloat16 if device.type == "cuda" and source.dtype == torch.bfloat16 else torch.float32
    return Compute(device, dtype, precision)


def _tokens(
    source: ModelSource, config: QuantizeConfig, device: torch.device, clock: Clock, progress: bool
) -> tuple[Tokens, Tokens]:
    """What to calibrate on, and what to train on from end to end: that and some more, judged by the same."""
    if not ALGORITHMS[config.method].needs_statistics(config):
        # Only to see which linears share an input; the values do not matter.
        ids = torch.arange(16)[None] % source.config.get_text_config().vocab_size
        few = Tokens(ids, ids[:0])
        return few, few
    check_context(source.config, config.sequence_length)

    def sequences(settings: Calibration, more: int = 0) -> Int64[Tensor, "samples length"]:
        if settings.text != SELF:
            with clock("open"):
                return windows(source.tokenizer, settings, more)
        with clock("sample"):
            whole = _whole_model(config, device, compute_for(source, device).precision)
            enough = replace(settings, samples=settings.samples + more)
            written = sample_sequences(whole, source.tokenizer.bos_token_id, enough, progress)
            del whole
            release_memory()
            return written

    settings, tuned = config.calibration_settings, config.tuned
    wanted = tuned.end_samples if config.end_to_end else 0
    drawn = sequences(settings, wanted if tuned.end_text == MORE else 0)  # at once, so that no two overlap
    spread = torch.linspace(0, len(drawn) - 1, settings.samples).round().long()
    tokens, others = split(drawn[spread]), drawn[torch.isin(torch.arange(len(drawn)), spread, invert=True)]
    if wanted and tuned.end_text != MORE:
        others = sequences(replace(settings, text=tuned.end_text, samples=wanted, seed=settings.seed + 1))
    return tokens, replace(tokens, train=torch.cat([tokens.train, others]))
