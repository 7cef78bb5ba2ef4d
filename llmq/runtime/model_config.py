"""The config.json of a checkpoint, which may come from strangers: what model it describes, and whether that can be.

transformers may build no more of it than the files beside it could fill.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.checkpoint.reader import CONFIG, Checkpoint
from llmq.core.errors import CheckpointError

# Config classes make lists as long as these numbers say, before anything is built: kinds of layers, names of labels.
_COUNTS = {
    re.compile(r"layer|depth|block|stage|expert|dense|indices|heads"): 1_000_000,  # Gemma 3n: a vocabulary "per layer"
    re.compile(r"label|class"): 10_000,  # each gets a name
}
_MODULES_PER_TENSOR = 20  # a block of Llama has 15 modules and 9 tensors or more; some models add dropouts
_SPARE = 1 << 28  # bytes of buffers that a model may have beside what its files hold: masks, rotary frequencies


def model_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The model's configuration without its quantization, for which transformers would want the format's own package.

    Raises CheckpointError if it describes no model, or one that cannot be what the files hold.
    """
    return tried_config(checkpoint, trust_remote_code)[0]


def tried_config(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, bool]:
    """`model_config`, and whether a model of it has been seen to run, on the meta device."""
    directory, files = checkpoint.directory, checkpoint.files
    stored = sum(files.nbytes(name) for name in files.names())
    try:
        _refuse_absurd(checkpoint.config)
        if "configuration_files" in checkpoint.config:  # transformers would open these instead
            raise ValueError("it points to other configuration files")
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        depth = config.get_text_config().num_hidden_layers
        if not 0 < depth <= len(files.names()):
            raise ValueError(f"{depth} blocks, of {len(files.names())} tensors")
        # Not for a checkpoint to say: which code computes attention (some names are fetched from the hub) and what a
        # model returns.
        config.output_attentions, config.return_dict = False, True
        config._attn_implementation = config._experts_implementation = None
        # Two bits are the least that a number takes.
        with torch.device("meta"), _bounded(len(files.names()), 4 * stored):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes check their own fields and raise what they like
        raise CheckpointError(
            f"{directory}: {CONFIG} describes no model transformers knows: {_first_line(error)}"
        ) from None
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > 4 * stored + _SPARE:
        raise CheckpointError(f"{directory}: {CONFIG} wants {buffers} bytes of buffers; all files have {stored}")
    return config, failure(model.eval(), torch.device("meta")) is None


def failure(model: Any, device: torch.device) -> str | None:
    """Why the model cannot run, as some settings only show then; None if it can."""
    try:
        with torch.no_grad(), device:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits.size()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def _refuse_absurd(config: Any) -> None:
    """Raise ValueError for a count, anywhere in a parsed config.json, that no model has."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:  # no recursion: the nesting, too, is theirs to choose
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(name, each) for each in value]
        elif isinstance(value, int | float):
            most = min((most for names, most in _COUNTS.items() if names.search(name)), default=None)
            if most is not None and not abs(value) <= most:
                raise ValueError(f"{name} is beyond {most}")


@contextmanager
def _bounded(tensors: int, numbers: int) -> Iterator[None]:
    """Raise ValueError as soon as this thread builds more modules than so many tensors fill, or one of more numbers."""
    mine, most = threading.get_ident(), 1000 + _MODULES_PER_TENSOR * tensors
    built = 0

    def count(parent: nn.Module, name: str, child: object) -> None:  # noqa: ARG001
        nonlocal built
        if threading.get_ident() != mine:
            return
        built += 1
        if built > most:
            raise ValueError(f"it describes more than {most} modules, for {tensors} tensors")
        if isinstance(child, Tensor) and child.numel() > numbers:
            raise ValueError(f"it wants a tensor of {child.numel()} numbers, more than all files could hold")

    with (
        torch_hooks.register_module_module_registration_hook(count),
        torch_hooks.register_module_parameter_registration_hook(count),
        torch_hooks.register_module_buffer_registration_hook(count),
    ):
        yield
