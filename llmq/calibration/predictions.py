"""What a model predicts from the hidden states that leave its last block: the norm and the words after the blocks."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmq.calibration.block_recorder import recorded
from llmq.calibration.block_runner import Compute
from llmq.core.errors import RequestError, first_line
from llmq.models.model_source import ModelSource, move_buffers

Predict = Callable[[Tensor], Tensor]


@contextmanager
def predictions(source: ModelSource, one: Int64[Tensor, "1 length"], compute: Compute) -> Generator[Predict]:
    """Load the weights outside the blocks, and free them at the end.

    Gives a function from hidden states of whole sequences, or of some of their tokens, to logits [batch, tokens, words]
    in float32. It computes in float32 whatever the blocks compute in: rounded logits would hide small differences.

    Args:
        one: a sequence, which shows what the model takes from its blocks.

    Raises RequestError if the model's own code fails without its blocks, or does not give a row for each token.
    """
    with recorded(source, one, compute) as recording:
        form, batch_dim = recording.form, recording.batch_dim
        sample = some_tokens(recording.sample, batch_dim, 2)
    inside = tuple(f"{name}." for name in source.block_names)
    names = [name for name in source.all_names if not name.startswith(inside)]
    dtype = torch.float32 if compute.device.type == "cpu" else compute.dtype
    source.load(names, compute.device, dtype)
    move_buffers(source.skeleton, compute.device)

    def predict(hidden: Float[Tensor, "*batch tokens features"]) -> Float[Tensor, "batch tokens words"]:
        def passed(block: int, *args: Any, **kwargs: Any) -> Any:
            entering = args[0] if args else kwargs["hidden_states"]
            return form(block, hidden.to(compute.device, dtype) if block == 0 else entering)

        sizes = hidden.shape[batch_dim], hidden.shape[token_dim(hidden, batch_dim)]
        for number, block in enumerate(source.blocks):
            block.forward = partial(passed, number)
        try:
            ids = torch.zeros(sizes, dtype=torch.int64, device=compute.device)
            with torch.no_grad():
                return source.skeleton(input_ids=ids, use_cache=False).logits.float()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any modelling code
            what = f"{type(error).__name__}: {first_line(error)}"
            raise RequestError(f"the model predicts nothing without its blocks ({what}), so use --bits") from error
        finally:
            for block in source.blocks:
                del block.forward

    try:
        if (found := predict(sample).shape[:2]) != (1, one.shape[1] // 2):
            raise RequestError(f"the model gives {tuple(found)} predictions for half of a sequence, so use --bits")
        yield predict
    finally:
        source.free(names)


def token_dim(hidden: Tensor, batch_dim: int) -> int:
    """Return the dimension of hidden states that counts tokens: the last but one, or the one before that."""
    return hidden.ndim - (3 if batch_dim == hidden.ndim - 2 else 2)


def some_tokens(
    hidden: Float[Tensor, "*batch tokens features"], batch_dim: int, step: int
) -> Float[Tensor, "*some features"]:
    """Return the hidden states of every `step`-th token."""
    dim = token_dim(hidden, batch_dim)
    return hidden.index_select(dim, torch.arange(step - 1, hidden.shape[dim], step, device=hidden.device))
