"""Trains a student with transformers' Trainer: mixed precision, several processes and checkpoints are its work."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from llmq.calibration.answers import Example
from llmq.calibration.block_runner import Compute
from llmq.core.distributed import processes
from llmq.core.train_config import TrainConfig
from llmq.qat.adapters import AdapterStudent
from llmq.qat.data import Data, collated
from llmq.qat.losses import Learner
from llmq.qat.outcome import Outcome
from llmq.run.student import Student

_STATE = "trainer_state.json"  # what Trainer writes last into a checkpoint of its own


class Sequences(Dataset[Example]):
    """Examples as torch's DataLoader wants them. `order`: their indices, if not each comes once."""

    def __init__(self, examples: list[Example], order: list[int] | None = None) -> None:
        self._examples, self._order = examples, list(range(len(examples))) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        return self._examples[self._order[index]]


def shuffled(count: int, wanted: int, seed: int) -> list[int]:
    """Return `wanted` of `count` indices, shuffled anew whenever all have come. So every batch is a whole one."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    while len(order) < wanted:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:wanted]


class _Trainer(Trainer):
    """Takes the sequences in their order, and measures the state as it would be stored."""

    student: Student | AdapterStudent

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.student.as_stored():
            return super().evaluate(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # pyright: ignore


class _Progress(TrainerCallback):
    """A bar with the loss, and the loss on held-out sequences."""

    def __init__(self, before: float, shown: bool) -> None:
        self._before, self._shown = before, shown
        self._bar: Any = None
        self._loss = math.nan

    def on_train_begin(self, *about: Any, **__: Any) -> None:
        _, state, _ = about
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, disable=not self._shown, unit="step")
        self._bar.set_description("training")

    def on_log(self, *about: Any, logs: Any = None, **__: Any) -> None:
        _, state, _ = about
        self._loss = (logs or {}).get("loss", self._loss)
        best = self._before if state.best_metric is None else min(state.best_metric, self._before)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {self._loss:.4f}, best held out {best:.4f}", refresh=False)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._bar.update(1)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._bar.close()


def train_student(
    student: Student | AdapterStudent, original: Any, data: Data, config: TrainConfig, directory: Path, progress: bool
) -> Outcome:
    """Train until the last step, or until nothing gets better; return the best state.

    `directory`: holds the checkpoints of the training. If there is one, the training goes on from there.
    """
    groups = parameter_groups(student, config)
    chosen = {id(tensor) for group in groups for tensor in group["params"]}
    learning = {name: tensor for name, tensor in student.model.named_parameters() if id(tensor) in chosen}
    for tensor in learning.values():
        tensor.requires_grad_()
    if config.checkpointing:
        model: Any = student.model
        # transformers before 5.20 knows the older name only
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    _without_dropout(student.model)
    optimizer, falling = optimizer_of(groups, config.steps)
    seen = config.steps * config.batch * processes()
    trainer = _Trainer(
        Learner(student.model, learning, original, config.loss),
        _arguments(student.compute, config, directory),
        collated,
        Sequences(data.train, shuffled(len(data.train), seen, config.seed)),
        Sequences(data.held_out),
        optimizers=(optimizer, falling),
    )
    trainer.student = student
    trainer.remove_callback(PrinterCallback)
    with torch.no_grad():
        before = trainer.evaluate()["eval_loss"]
    trainer.add_callback(_Progress(before, progress))
    if config.patience:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    last = _last_state(directory)
    if last is not None and _has_ended(last, config):
        trainer.state = _take_best(trainer, last)
    else:
        if last is not None and progress:
            print(f"the training goes on after step {_step(last)}", file=sys.stderr)
        with torch.enable_grad():
            trainer.train(resume_from_checkpoint=last and str(last))
    state = trainer.state
    history = [{"step": each["step"], "loss": each["eval_loss"]} for each in state.log_history if "eval_loss" in each]
    best = state.best_metric
    if best is None or not best < before:
        return Outcome({}, before, before, state.global_step, history)
    return Outcome(student.tensors(), before, best, state.global_step, history)


def optimizer_of(groups: list[dict[str, Any]], steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return Adam for groups of parameters with their learning rates, and what lets the rates fall to 0.

    Fused, a step takes a seventh of the time: 0.015 against 0.105 s for 53 million parameters (2 cores with AVX-512
    BF16, torch 2.13, 2026-11-29).
    """
    # In code units, gradients of large models can come near the usual eps of 1e-8.
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - min(step, steps - 1) / steps)


def _without_dropout(model: nn.Module) -> None:
    """Let nothing drop out: the rounding is noise enough, and the original that is followed has none."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 it is an attribute of some modules


def parameter_groups(student: Student | AdapterStudent, config: TrainConfig) -> list[dict[str, Any]]:
    """Return what learns, with its learning rates. A rate of 0 leaves a group out."""
    learners: dict[str, list[nn.Parameter]] = student.learners()
    rates = {name: getattr(config, name) for name in learners}
    return [{"params": learners[name], "lr": rate} for name, rate in rates.items() if learners[name] and rate > 0]


@torch.no_grad()
def held_out_loss(model: nn.Module, original: Any, data: Data, config: TrainConfig, compute: Compute) -> float:
    """Return the loss of a model on the held-out sequences, as the training measures it."""
    learner, losses = Learner(model.eval(), {}, original, config.loss), list[float]()
    low = compute.precision != torch.float32
    for start in range(0, len(data.held_out), config.micro_batch):
        batch = collated(data.held_out[start : start + config.micro_batch])
        with torch.autocast(compute.device.type, compute.precision, enabled=low):
            loss = learner(**{name: tensor.to(compute.device) for name, tensor in batch.items()})["loss"]
        losses += [float(loss)] * len(batch["labels"])
    return sum(losses) / len(losses)


def _arguments(compute: Compute, config: TrainConfig, directory: Path) -> TrainingArguments:
    every = math.ceil(config.steps / config.checks)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        per_device_eval_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch // config.micro_batch,
        max_grad_norm=0.0,  # codes, scales and embeddings have gradients of different units
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        restore_callback_states_from_checkpoint=config.patience > 0,  # how long nothing was better
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would leave sequences with NaN out of the held-out loss
        ddp_broadcast_buffers=False,  # codes and scales that never change
        disable_tqdm=True,
        report_to="none",
        log_level="error",  # it would tell what it does; our bar tells how it goes
        remove_unused_columns=False,
        dataloader_pin_memory=compute.device.type == "cuda",
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=compute.device.type == "cpu",
        bf16=compute.precision == torch.bfloat16,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # pyright: ignore[reportPrivateUsage] no nn.DataParallel
    return arguments


def _last_state(directory: Path) -> Path | None:
    """Return the last checkpoint of a training that is whole; None if there is none."""
    whole = [path.parent for path in directory.glob(f"checkpoint-*/{_STATE}")]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _has_ended(checkpoint: Path, config: TrainConfig) -> bool:
    """Return whether the training ended with this state. Trainer would do one step more."""
    kept: Any = TrainerState.load_from_json(str(checkpoint / _STATE)).stateful_callbacks or {}
    waited = kept.get("EarlyStoppingCallback", {}).get("attributes", {}).get("early_stopping_patience_counter", 0)
    return _step(checkpoint) >= config.steps or (config.patience > 0 and waited >= config.patience)


def _take_best(trainer: Trainer, last: Path) -> TrainerState:
    """Set the model to the best state of a training that ended; return what Trainer noted of it."""
    state = TrainerState.load_from_json(str(last / _STATE))
    if state.best_model_checkpoint is not None:
        best = last.with_name(Path(state.best_model_checkpoint).name)
        model: Any = trainer.model
        model.load_state_dict(load_file(best / "model.safetensors"))
    return state
