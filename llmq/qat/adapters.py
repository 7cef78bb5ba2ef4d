"""LoRA on a packed checkpoint, and the way back into one: W + B A is written as a dense model, and quantized again.

The sum lies on no grid, so each layer is solved anew, with all that llmq.quantize does: a new grid, GPTQ, matching.
"""

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.block_runner import Compute
from llmq.checkpoint.model_files import Companions, companions_in
from llmq.checkpoint.output_dir import ADAPTER
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import Writer
from llmq.core.config import QuantizeConfig
from llmq.core.errors import CheckpointError
from llmq.core.train_config import TrainConfig
from llmq.formats import mlx
from llmq.models.model_source import build_skeleton
from llmq.runtime.load import load
from llmq.runtime.lora import get_peft_model
from llmq.runtime.model_config import model_config
from llmq.runtime.rounded_inputs import round_inputs


class AdapterStudent:
    """A packed checkpoint with LoRA adapters on its packed linears; they alone learn.

    `layers`: the names of the linears that get one.
    """

    def __init__(self, start: Path, config: TrainConfig, compute: Compute, layers: set[str]) -> None:
        import peft

        self.compute, self.start = compute, start
        base = load(start, str(compute.device), torch.float32, config.trust_remote_code).requires_grad_(False)
        if config.activations == 8:
            round_inputs(base)
        settings = peft.LoraConfig(
            r=config.lora,
            lora_alpha=2 * config.lora,
            target_modules=sorted(layers),
            base_model_name_or_path=config.model,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(config.seed)
        self.model: Any = get_peft_model(base, settings)

    def learners(self) -> dict[str, list[Any]]:
        """Return what learns, by the name of its learning rate."""
        return {"lora_rate": [tensor for tensor in self.model.parameters() if tensor.requires_grad]}

    def as_stored(self) -> nullcontext[None]:
        """Return a context in which adapters have the values that would be stored: they are stored in float32."""
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of the adapters by their names in the model."""
        return {n: t.detach().to("cpu", copy=True) for n, t in self.model.named_parameters() if t.requires_grad}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Set the adapters to what `tensors` returned."""
        for name, tensor in tensors.items():
            self.model.get_parameter(name).copy_(tensor)

    def delta(self, name: str) -> Tensor | None:
        """Return what the adapter adds to the weight of this linear [out, in]; None if it has none."""
        linear = self.model.base_model.model.get_submodule(name)
        return linear.get_delta_weight("default").detach().cpu() if hasattr(linear, "get_delta_weight") else None


def view_of(start: Path, trust_remote_code: bool) -> Checkpoint:
    """Return a checkpoint with the names of its model."""
    checkpoint = Checkpoint(start)
    return checkpoint.for_model(build_skeleton(model_config(checkpoint, trust_remote_code), trust_remote_code))


def write_dense(student: AdapterStudent, output: Path, config: TrainConfig) -> None:
    """Write the sum of packed weights and adapters as a dense model, in the dtype of what is not packed."""
    companions = companions_in(student.start)
    plain = {k: v for k, v in companions.config.items() if k not in ("quantization_config", mlx.SETTINGS)}
    with Writer(output, overwrite=True) as writer:
        for tensors in _dense(student, view_of(student.start, config.trust_remote_code)):
            writer.put(tensors)
        writer.finish(Companions(plain, companions.write))


def _dense(student: AdapterStudent, view: Checkpoint) -> Generator[dict[str, Tensor]]:
    """Yield the tensors of the dense model, by their names in the files."""
    files = view.model_files
    stored = [name for name in view.other_names for name in files.stored_names(name)]
    dtype = next((files.stored.dtype(name) for name in stored), torch.float32)
    for _, names in groupby(sorted(set(stored)), key=lambda name: name.rpartition(".")[0]):
        yield {name: files.stored.read(name) for name in names}
    for name in view.linears:
        W, delta = view.weight(name).dequantize(), student.delta(name)
        if delta is not None:
            W += delta
        if not bool(W.isfinite().all()):
            raise CheckpointError(f"{name}: the sum of the weight and its adapter is not finite")
        yield {f"{view.stored_linear(name)}.weight": W.to(dtype)}


def merging(config: TrainConfig, start: Path, dense: Path, output: Path) -> QuantizeConfig:
    """Return the request that quantizes the dense sum as its start was quantized."""
    view = view_of(start, config.trust_remote_code)
    schemes = list(view.schemes.values())
    bits = max({scheme.bits for scheme in schemes}, key=[scheme.bits for scheme in schemes].count)
    return config.quantizing(
        str(dense),
        output,
        bits=bits,
        group_size=schemes[0].group_size,
        symmetric=schemes[0].symmetric,
        layer_bits=tuple(f"{name}={scheme.bits}" for name, scheme in view.schemes.items() if scheme.bits != bits),
        format=view.format.METHOD,
        overwrite=True,
    )


def with_adapter(companions: Companions, student: AdapterStudent) -> Companions:
    """Return companions that also write the adapters, as peft reads them, into a directory of their own."""

    def write(target: Path) -> None:
        companions.write(target)
        student.model.save_pretrained(target / ADAPTER)

    return replace(companions, write=write)
