"""Trains a packed model as a whole to predict what the original model predicts.

Scales, norms and biases learn, and on request the codes.

Objective:    KL(original || quantized) of the next token, mean over the tokens of a text

Block by block, a layer can only learn to reproduce its own outputs. Here the layers learn together what counts in the
end: the predictions. EfficientQAT (Chen et al., arXiv 2407.11062) ends with such a phase for the scales alone, on the
text's next tokens. LLM-QAT (Liu et al., arXiv 2305.17888) distils, as here: for each token, the original's predictions
tell more than the text.

With little text the model learns it by heart, so there is more text than for calibration. 2-bit SmolLM2-135M has KL
1.27 before; 58 windows gave 1.12, 480 more gave 1.00, 96 texts of its own gave 1.04 (some 120 steps of 512 to 1024
tokens, 2026-11-23).

The state with the least loss on held-out text is kept; that may be the start. The file format stays the same. Norms and
biases are stored unquantized, and they change too.

Memory: the original model; 16 bytes for each quantized weight (latent code, gradient and the two moments of Adam), or 1
if codes do not learn; what the layers keep for the backward pass; three copies of a batch's logits.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmq.calibration.hidden_states import States
from llmq.calibration.texts import Tokens
from llmq.checkpoint.digests import digests_of
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import Writer, by_module
from llmq.core.errors import WorkError
from llmq.core.memory import release_memory
from llmq.core.settings import Tuned
from llmq.run.block_loop import finish, quantize_blocks
from llmq.run.block_quantizer import Run
from llmq.run.journal import Journal
from llmq.run.prepare import Request, whole_model
from llmq.run.resume import TRAINING, Progress
from llmq.run.student import Learning, Student
from llmq.run.training_state import TrainingState
from llmq.training.kl_loss import divergence
from llmq.training.loop import Saved, Task, train


def distill(
    student: Student,
    original: Any,
    tokens: Tokens,
    settings: Tuned,
    progress: bool = False,
    saved: Saved | None = None,
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Train a packed checkpoint. `original`: the model that it was made from, ready to run on the same device.

    `saved`: where the state of an unfinished training is kept, and where it goes on from.

    Returns:
        the tensors of the checkpoint that changed, by name; and the mean KL on held-out text, before and after.
    """

    compute = student.compute

    def loss(ids: Int64[Tensor, "batch length"]) -> Float[Tensor, ""]:
        ids = ids.to(compute.device)
        with torch.autocast(compute.device.type, compute.precision, enabled=compute.precision != torch.float32):
            with torch.no_grad():
                wanted = original(input_ids=ids, use_cache=False).logits
            return divergence(student.model(input_ids=ids, use_cache=False).logits, wanted)

    def held_out() -> float:
        with student.as_stored():
            return sum(float(loss(ids[None])) for ids in tokens.held_out) / len(tokens.held_out)

    learners = student.learners()
    task = Task(
        [
            (list[Tensor](learners["rate"]), settings.end_rate),
            (list[Tensor](learners["scale_rate"]), settings.end_scale_rate),
        ],
        len(tokens.train),
        lambda batch: loss(tokens.train[batch]),
        held_out,
        student.tensors,
    )
    return train(task, settings.end_steps, settings.end_batch, {}, progress, saved)


def quantize_and_train(request: Request, run: Run, writer: Writer, journal: Journal, states: States) -> None:
    """Write a first checkpoint block by block into a workroom, train it, and save the trained tensors with `writer`.

    If an interrupted run got that far, the first checkpoint is there already, and perhaps the state of its training, or
    the trained tensors.
    """
    with writer.workroom() as first:
        progress = Progress(run, first, journal, request.steps)
        if not progress.is_done(TRAINING):
            if not first.is_finished:
                quantize_blocks(request, run, progress, states)
                finish(request, run, first)
            _train(request, run, first.directory, writer, progress)
    writer.keep_parts(progress.parts)


def _train(request: Request, run: Run, directory: Path, writer: Writer, progress: Progress) -> None:
    """Train the checkpoint in `directory` as a whole, and save the tensors of the trained one with `writer`.

    Raises WorkError if a GPU has too little memory.
    """
    config, compute = run.config, request.compute
    with run.clock("distill"):
        release_memory()
        try:
            original = whole_model(config, device=compute.device, dtype=compute.dtype)
            learning = Learning(codes=config.tuned.end_rate > 0)
            student = Student(directory, original, compute, config.trust_remote_code, learning)
            saved = TrainingState(writer.work / "training.safetensors")
            changed, run.report.distilled = distill(
                student, original, request.training, config.tuned, request.progress, saved
            )
        except torch.OutOfMemoryError:
            raise WorkError(
                "training the whole model does not fit into the GPU's memory.\n"
                "--tuned.end-rate 0 (the default) and --tuned.end-batch 1 need less; "
                "--tuned.end-steps 0 --tuned.steps 100 trains one block after the other"
            ) from None
    checkpoint = Checkpoint(directory)
    run.tensors.digests = digests_of(checkpoint, changed)
    progress.save(TRAINING, by_module(checkpoint.files, changed), writer=writer)
    progress.commit()
