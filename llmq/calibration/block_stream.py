"""The layer-by-layer loop: every block sees the hidden states it will see in the quantized model.

    tokens ──► embeddings ──► hidden states ──► block 0 ──► block 1 ──► …        one block's weights in memory at a time
                                     │             │
                              recorded once    yielded to be quantized, then run again to give block 1 its inputs

(Frantar et al. 2022, arXiv 2210.17323, section 4.)
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import nn

from llmq.calibration.block_recorder import Recording, recorded
from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.hidden_states import HiddenDir, HiddenStates, PinnedStates, StoredStates
from llmq.calibration.texts import Tokens
from llmq.calibration.work_split import portion_of
from llmq.core.distributed import ALONE, Ranks
from llmq.core.memory import release_memory
from llmq.core.timing import Clock
from llmq.models.model_source import ModelSource


@dataclass(frozen=True)
class StreamSettings:
    """How hidden states pass through the model, and where they start."""

    keep_original: bool = False  # give blocks the original's hidden states too, if there are held-out samples
    ranks: Ranks = ALONE
    stop: int | None = None  # index after the last block that is wanted
    linears: torch.dtype | None = None  # dtype in which linears are loaded; None for the dtype of computation
    states_unused: bool = False  # the method needs no statistics, so hidden states are not passed on
    finished: int = 0  # number of blocks that an earlier process finished; they are not yielded
    restore: Callable[[Block], None] = lambda _: None  # gives a finished block its final weights
    passed: Callable[[], None] = lambda: None  # called when the hidden states have passed a block, which is done
    hidden_dir: HiddenDir | None = None  # directory for hidden states; None to keep them in memory
    resident: bool = False  # if in memory, keep hidden states on the device of the computation

    @property
    def has_states(self) -> bool:
        """Return whether an earlier process left the inputs of the first unfinished block on disk."""
        return self.hidden_dir is not None and self.hidden_dir.turn is not None


def stream(
    source: ModelSource, tokens: Tokens, compute: Compute, clock: Clock, settings: StreamSettings | None = None
) -> Generator[Block]:
    """Yield each block in order. The weights that the caller leaves in it decide what the next block sees."""
    settings = settings or StreamSettings()
    states, names = _StreamedStates(source, tokens, compute, clock, settings), source.block_names[: settings.stop]
    try:
        for index, name in enumerate(names):
            # If blocks share more than hidden states, the sample passes all of them.
            is_needless = settings.has_states or (settings.states_unused and states.shared is None)
            if index < settings.finished and is_needless:
                continue
            block = states.enter(index, name)
            if index >= settings.finished:
                yield block
            else:
                with clock("forward"):  # the weights are still the original ones
                    _pass_through(block, original=True)
                settings.restore(block)
            if not settings.states_unused and name != names[-1]:
                with clock("forward"):
                    _pass_through(block)
            if states.shared is not None:
                states.shared.next_block()
            settings.passed()
            source.free(source.block_tensor_names(name, aliases=True))
            block.kept_inputs.forget()
            release_memory()
    finally:
        states.close()


def _pass_through(block: Block, original: bool = False) -> None:
    """Replace the hidden states that enter a block, in this or the original model, by its outputs."""
    states = block.original if original else block.hidden
    if states is not None:
        with block.many_runs():
            for i in range(len(states)):
                states[i] = block.run_batch(i, original, leave=True)


class _StreamedStates:
    """The hidden states of this process, which enter one block after the other."""

    def __init__(
        self, source: ModelSource, tokens: Tokens, compute: Compute, clock: Clock, settings: StreamSettings
    ) -> None:
        self.source, self.compute, self.clock, self.settings = source, compute, clock, settings
        self.portion = portion_of(tokens, settings.ranks)
        with clock("forward"), recorded(source, tokens.train[:1], compute, settings.hidden_dir) as recording:
            self.arguments, self.batch_dim = recording.arguments, recording.batch_dim
            self.shared = recording.shared_states()
            self.hidden = self._room_for("quantized", recording)
            has_original = settings.keep_original and len(tokens.held_out) > 0
            self.original = self._room_for("original", recording) if has_original else None
            self._record(recording)
            self.sample = settings.ranks.share(recording.sample).cpu()

    def _room_for(self, kind: str, recording: Recording) -> HiddenStates:
        """Return a list, on the device, in memory or on disk, with room for the hidden states of each micro-batch."""
        batches, device = self.portion.batches, self.compute.device
        shapes = [recording.shape_for(len(batch)) for batch in batches]
        if self.settings.hidden_dir is not None:
            return StoredStates(self.settings.hidden_dir, kind, shapes, self.compute.dtype)
        if device.type == "cpu" or self.settings.resident:
            return [torch.empty(0)] * len(batches)
        return PinnedStates(shapes, self.compute.dtype, device)

    def _record(self, recording: Recording) -> None:
        """Set the first block's inputs, unless later ones are on disk, and keep the arguments that depend on tokens."""
        for i, batch in enumerate(self.portion.batches):
            if self.settings.has_states and not recording.depends_on_tokens:
                break
            hidden = recording.keep(i, batch)
            if not self.settings.has_states:
                self.hidden[i] = hidden
                if self.original is not None:  # both models have the same embeddings
                    self.original[i] = hidden

    def enter(self, index: int, name: str) -> Block:
        """Return a block with its weights loaded, and with the hidden states as they are now."""
        with self.clock("read"):
            module = load_block(self.source, name, self.compute, self.settings.linears)
        states = (self.hidden, self.portion.held_out_from, self.arguments[index], self.compute, self.original)
        block = Block(name, module, *states, self.settings.ranks, self.portion.shares, self.sample)
        block.batch_dim, block.shared = self.batch_dim, self.shared
        if self.shared is not None:
            with self.clock("forward"):
                block.run(self.sample, leave=True)
        return block

    def close(self) -> None:
        """Close the files of hidden states on disk."""
        for states in (self.hidden, self.original):
            if isinstance(states, StoredStates):
                states.close()


def load_block(source: ModelSource, name: str, compute: Compute, linears: torch.dtype | None) -> nn.Module:
    """Load the weights of a block. `linears`: dtype of its linears' weights, if it is not that of `compute`."""
    module, names = source.skeleton.get_submodule(name), source.block_tensor_names(name, aliases=True)
    weights = {f"{name}.{inner}.weight" for inner, m in module.named_modules() if isinstance(m, nn.Linear)}
    source.load([tensor for tensor in names if tensor in weights], compute.device, linears or compute.dtype)
    source.load([tensor for tensor in names if tensor not in weights], compute.device, compute.dtype)
    return module
