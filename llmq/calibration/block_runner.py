"""One decoder block while it is quantized: its weights, and the hidden states that enter it.

It runs in two models: "this model" is quantized up to this block; "the original model" has no changed weight.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from math import fsum

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from llmq.calibration.block_arguments import (
    Arguments,
    Carried,
    ModelBatch,
    PerBatch,
    Resolver,
    Shared,
    SharedStates,
    as_float32,
)
from llmq.calibration.causal_attention import causal_in_strips
from llmq.calibration.hidden_states import HiddenStates
from llmq.calibration.kept_inputs import KeptInputs
from llmq.calibration.work_split import Share, shares_of
from llmq.core.device import numbers, on_host
from llmq.core.distributed import ALONE, Ranks
from llmq.core.errors import LlmqError, RequestError, first_line
from llmq.models.block_structure import Group, linear_of


@dataclass(frozen=True)
class Compute:
    """The device and the dtypes of a computation."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # dtype of weights and hidden states
    precision: torch.dtype = torch.float32  # dtype of matmuls' factors inside the blocks, if lower than `dtype`

    @property
    def factors(self) -> torch.dtype:
        """Return the dtype of the weights that matmuls use."""
        return self.precision if self.dtype == torch.float32 else self.dtype


@dataclass
class Block:
    """One decoder block with its weights loaded, and the hidden states that enter it."""

    name: str
    module: nn.Module
    hidden: HiddenStates  # micro-batches of this process as they enter the block; the held-out ones come last
    held_out_from: int  # index of the first held-out micro-batch in `hidden`
    arguments: Arguments | None  # what else the model passes: a mask, …; None: it leaves the block out
    compute: Compute
    original: HiddenStates | None = None
    """The same micro-batches as they enter the block in the original model; None if they are not needed. The last run
    on them replaces them by the block's outputs."""
    ranks: Ranks = ALONE
    shares: list[Share] = field(default_factory=list)  # of all processes, in the order in which they are summed
    sample: Tensor | None = None  # hidden states of one sequence, the same in all processes
    folds: dict[str, Tensor] = field(default_factory=dict)
    """By the first linear of a group: what a method divided its input by, channel by channel (not the original's)."""
    batch_dim: int = 0  # the dimension of hidden states that counts sequences
    shared: SharedStates | None = None  # what blocks leave for later ones; None if that is hidden states alone
    kept_inputs: KeptInputs = field(init=False, repr=False)
    _writes: bool = False  # whether the block is known to change a container that it shares with later ones
    _replaced: dict[str, Tensor] = field(default_factory=dict)  # the original's parameters that were changed, by name
    _original_has_run: bool = False  # for the last time

    def __post_init__(self) -> None:
        self.kept_inputs = KeptInputs(self.module, self.compute.device)
        if not self.shares:
            self.shares = shares_of(self.held_out_from, len(self.hidden) - self.held_out_from, self.ranks)
        if self.sample is None:
            self.sample = self.hidden[0][:1]

    @property
    def drift(self) -> float | None:
        """Return Σ (x - x_o)² / Σ x_o² over held-out hidden states x; None if the original ones, x_o, are not known."""
        if self.original is None:
            return None
        lost, whole = list[float | Tensor](), list[float | Tensor]()
        for i in range(self.held_out_from, len(self.hidden)):
            original = self.original[i].float()
            lost.append(on_host((self.hidden[i] - original).square().sum()))
            whole.append(on_host(original.square().sum()))
        energies = self.ranks.each((numbers(lost), numbers(whole)))
        lost, whole = zip(*energies, strict=True)
        return fsum(chain(*lost)) / fsum(chain(*whole))  # fsum is exact, so the order of the processes does not matter

    def many_runs(self) -> AbstractContextManager[None]:
        """Hold the weights in the dtype of matmuls, so that they are not cast again for every micro-batch."""
        weights = [module.weight for module in self.module.modules() if isinstance(module, nn.Linear)]
        return _other_data(weights, [weight.data.to(self.compute.factors) for weight in weights])

    @torch.no_grad()
    def run(
        self, hidden: Float[Tensor, "*batch tokens features"], leave: bool = False
    ) -> Float[Tensor, "*batch tokens features"]:
        """Return the block's output for the sample, or for other sequences as long, on the block's device.

        Raises RequestError if the block's own code fails.
        """
        try:
            return self.run_with({}, hidden, leave=leave)
        except (LlmqError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any modelling code
            what = f"{type(error).__name__}: {first_line(error)}"
            raise RequestError(f"{self.name} does not run outside its model ({what}); llmq cannot stream it") from error

    def run_with(
        self,
        weights: dict[str, Tensor],
        hidden: Float[Tensor, "*batch tokens features"],
        batch: ModelBatch | None = None,
        leave: bool = False,
    ) -> Float[Tensor, "*batch tokens features"]:
        """Return the output with `weights` in place of the block's own. Computes gradients if they are enabled.

        Args:
            batch: the micro-batch that `hidden` is, and the model; None for the sample.
            leave: keep what the block leaves for later ones: it does not run again on this micro-batch in this model.
        """
        device = self.compute.device
        if self.arguments is None:
            return hidden.to(device)
        left = None if self.shared is None else self.shared.entering(batch, device)
        values = Resolver(hidden.shape[self.batch_dim], None if batch is None else batch[0], left, device)
        args, kwargs = tree_map(values, self.arguments)
        with self.autocast(), self._attention():
            output = torch.func.functional_call(self.module, weights, (hidden.to(device), *args), kwargs)
        if leave and self.shared is not None:
            self.shared.leave(batch, values.left_by(output))
            self._writes |= values.was_written()
        return output[0] if isinstance(output, tuple | list) else output

    def autocast(self) -> torch.autocast:
        """Multiply in the precision of matmuls inside."""
        factors = self.compute.factors
        return torch.autocast(self.compute.device.type, factors, enabled=factors != self.compute.dtype)

    def _attention(self) -> AbstractContextManager[None]:
        in_strips = self.compute.device.type == "cpu" and self.compute.factors == torch.bfloat16
        return causal_in_strips() if in_strips else nullcontext()

    def run_together(self, weights: dict[str, Tensor], batches: list[int]) -> Float[Tensor, "*batch tokens features"]:
        """Return the outputs of `run_with` for these micro-batches, side by side in dimension `batch_dim`."""
        alone = any(isinstance(leaf, PerBatch | Shared | Carried) for leaf in tree_leaves(self.arguments))
        if not alone:
            return self.run_with(weights, torch.cat([self.hidden[i] for i in batches], self.batch_dim))
        outputs = [self.run_with(weights, self.hidden[i], (i, False)) for i in batches]
        return torch.cat(outputs, self.batch_dim)

    @torch.no_grad()
    def run_exact(self, hidden: Float[Tensor, "*batch tokens features"]) -> Float[Tensor, "*batch tokens features"]:
        """Return the block's output for the sample, with weights and products in float32, whatever it computes in."""
        weights = {name: parameter.float() for name, parameter in self.module.named_parameters()}
        exact = replace(self, original=None, compute=Compute(self.compute.device))
        exact.arguments = tree_map(as_float32, self.arguments)
        exact.shared = None if self.shared is None else self.shared.as_float32()
        return exact.run_with(weights, hidden.float())

    def run_batch(self, i: int, original: bool = False, leave: bool = False) -> Float[Tensor, "*batch tokens features"]:
        """Return the block's output for micro-batch i. `original`: that of the original model. `leave`: see above."""
        original = original and self.original is not None
        hidden = self.original if original and self.original is not None else self.hidden
        replaced = self._replaced if original else {}
        parameters = [self.module.get_parameter(name) for name in replaced]
        with torch.no_grad(), _other_data(parameters, list(replaced.values())), self.kept_inputs.used(i, original):
            left_by = (i, original and hidden is not self.hidden)  # in a trial, what enters is the same in both
            return self.run_with({}, hidden[i], left_by, leave)

    def expect(self, stages: list[list[Group]]) -> None:
        """Announce the groups that will be replaced together, in order (see `KeptInputs`)."""
        if not self._writes:  # a submodule that is skipped would write nothing for later blocks
            self.kept_inputs.expect(stages)

    def replace_weight(self, name: str, W: Float[Tensor, "out in"]) -> None:
        """Set the weight of a linear. The original model keeps the old one, if it runs again."""
        linear = linear_of(self.module, name)
        if self.original is not None and not self._original_has_run:
            self._replaced.setdefault(f"{name}.weight", linear.weight.data.to(self.compute.factors))
        linear.weight.data = W.to(linear.weight.dtype)
        self.kept_inputs.replaced(name)

    def keep_original(self) -> None:
        """Copy all parameters for the original model. Later changes of any parameter do not reach it."""
        if self.original is not None:
            for name, parameter in self.module.named_parameters():
                dtype = self.compute.factors if parameter.ndim == 2 else parameter.dtype
                self._replaced[name] = parameter.data.to(dtype, copy=True)

    def forget_original(self) -> None:
        """Free the original model's parameters: it does not run through this block again."""
        self._replaced.clear()
        self._original_has_run = True


@contextmanager
def _other_data(parameters: Sequence[Tensor], data: Sequence[Tensor]) -> Generator[None]:
    """Give parameters other data, and their own back at the end."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, other in zip(parameters, data, strict=True):
            parameter.data = other
        yield
    finally:
        for parameter, before in zip(parameters, own, strict=True):
            parameter.data = before
