"""A packed checkpoint as a model that can learn: for `--method tuned` and for llmq.train."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibration.block_runner import Compute
from llmq.checkpoint.reader import Checkpoint
from llmq.core import grid
from llmq.core.errors import WorkError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import TENSOR, TOKEN
from llmq.models.conv1d import stored_transposed
from llmq.models.model_source import build_skeleton
from llmq.models.stored_names import tied_names
from llmq.runtime.load import load
from llmq.runtime.model_config import model_config
from llmq.runtime.packed_linear import PackedLinear
from llmq.training.input_range import InputRange, input_scales
from llmq.training.learnable_linear import LearnableLinear
from llmq.training.learnable_weight import Latent


@dataclass(frozen=True)
class Learning:
    """What of a model learns, and how the inputs of its linears are rounded."""

    codes: bool = False
    """Whether the codes of the packed linears learn, not only their scales."""
    outside: bool = False
    """Whether everything that is not packed learns: embeddings, routers, …, not only norms and biases."""
    layers: Callable[[str], bool] = lambda _: True
    """Which packed linears learn, by name. The others stay as they are."""
    inputs: str = ""
    """How the inputs of packed linears are rounded to 8 bits, as in `Scheme`; empty: as the checkpoint says."""


_SCALES = Learning()


class Student:
    """A packed checkpoint as a model that can learn, in float32.

    `original`: the model that the checkpoint was made from; None if it is not known.
    """

    def __init__(
        self,
        directory: Path,
        original: Any,
        compute: Compute,
        trust_remote_code: bool = False,
        learning: Learning = _SCALES,
    ) -> None:
        self.compute, self.latents = compute, dict[str, Latent]()
        self.ranges: dict[str, InputRange] = {}
        """The ranges of inputs that have one scale for all tokens, by the names of their linears."""
        self._first_scales: dict[str, tuple[torch.dtype, Tensor | None]] = {}
        checkpoint = Checkpoint(directory)
        skeleton = build_skeleton(model_config(checkpoint, trust_remote_code), trust_remote_code)
        self.checkpoint = checkpoint.for_model(skeleton)

        def learnable(name: str, weight: QuantizedWeight, bias: Tensor | None) -> nn.Module:
            codes, learns = learning.codes, learning.layers(name)
            rounded = self.checkpoint.schemes[name].rounded_inputs or learning.inputs
            if rounded == TENSOR:
                self._first_scales[name] = weight.scale.dtype, weight.input_scale
            if not learns:
                linear = PackedLinear.from_codes(replace(weight, input_scale=None), bias)
                linear.rounds_inputs = rounded == TOKEN
                return linear
            hint = None
            if original is not None and codes:
                hint = original.get_submodule(name).weight.detach().to(weight.q.device)
            self.latents[name] = Latent(weight, hint, codes)
            return LearnableLinear(self.latents[name], bias, rounded == TOKEN)

        model = load(directory, str(compute.device), torch.float32, trust_remote_code, make_linear=learnable)
        self.model = model.requires_grad_(False)
        self._files = files = self.checkpoint.model_files
        named: dict[str, nn.Parameter] = {n: p for n, p in self.model.named_parameters() if files.is_renamed(n)}
        self.vectors = {name: tensor for name, tensor in named.items() if tensor.ndim == 1}
        """Norms and biases."""
        self.matrices = {name: tensor for name, tensor in named.items() if tensor.ndim > 1 and learning.outside}
        """All other weights outside of the packed linears, if they learn."""
        self._stored = {name: files.dtype(name) for name in (*self.vectors, *self.matrices)}
        self._transposed = stored_transposed(skeleton)
        # Files may hold embeddings a second time as lm_head.
        self._aliases = {alias: of for alias, of in tied_names(skeleton).items() if alias in files.names()}

    def learners(self) -> dict[str, list[nn.Parameter]]:
        """Return what learns, by the name of its learning rate."""
        latents: Any = self.latents.values()
        codes = [latent.V for latent in latents if isinstance(latent.V, nn.Parameter)]
        scales = [*(each for latent in latents for each in latent.grids), *self.vectors.values()]
        scales += {id(each): each.factor for each in self.ranges.values()}.values()
        return {"rate": codes, "scale_rate": scales, "outside_rate": list(self.matrices.values())}

    def best_ranges(self, sequences: Sequence[Tensor]) -> list[tuple[list[str], float]]:
        """Return the linears whose input is one and has one scale, and the scale that is best on these token ids.

        Raises WorkError if no token reaches one of them.
        """
        linears = {name: self.model.get_submodule(name) for name in self._first_scales}
        found = input_scales(self.model, linears, sequences) if linears else []
        for name in linears.keys() - {name for names, _ in found for name in names}:
            raise WorkError(f"{name}: no token reaches it, so its inputs get no scale; use --activation-scheme dynamic")
        return found

    def add_ranges(self, found: Sequence[tuple[list[str], float]]) -> None:
        """Let linears round their inputs with stored scales, the largest where several share one, or with new ones."""
        for names, best in found:
            scales = [scale for name in names if (scale := self._first_scales[name][1]) is not None]
            scale = max(scales, key=float, default=grid.storable(torch.tensor([best]), self._first_scales[names[0]][0]))
            shared = InputRange(scale.to(self.compute.device))
            for name in names:
                self.ranges[name] = shared
                shared.goes_before(self.model.get_submodule(name))

    def input_scales(self) -> dict[str, Tensor]:
        """Return the scales of inputs as they would be stored now, by their names in the files."""
        return {f"{self._files.stored_linear(n)}.input_scale": each.rounded().cpu() for n, each in self.ranges.items()}

    @property
    def others(self) -> dict[str, nn.Parameter]:
        """Return all that learns outside of the packed linears."""
        return self.vectors | self.matrices

    @contextmanager
    def as_stored(self) -> Generator[None]:
        """Round what is not packed to its stored dtype while inside. (Packed weights always compute as stored.)"""
        exact = {name: tensor.data for name, tensor in self.others.items()}
        for name, tensor in self.others.items():
            tensor.data = tensor.data.to(self._stored[name]).float()
        try:
            yield
        finally:
            for name, tensor in self.others.items():
                tensor.data = exact[name]

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of the tensors that would be stored now, by their names in the files."""
        stored = dict[str, Tensor]()
        for name, tensor in self.others.items():
            kept = tensor.detach().to(self._stored[name])
            for each in (name, *(alias for alias, of in self._aliases.items() if of == name)):
                stored[self._files.stored_names(each)[0]] = kept.T if each in self._transposed else kept
        for name, latent in self.latents.items():
            scheme = self.checkpoint.schemes[name]
            stored |= self.checkpoint.format.encode(self._files.stored_linear(name), latent.rounded(), scheme)
        stored |= self.input_scales()
        return {n: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in stored.items()}
