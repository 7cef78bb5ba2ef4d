"""Reads the config.json of a checkpoint, which may come from strangers, and checks the model that it describes.

transformers is stopped as soon as it builds more of that model than the files beside config.json could fill.
"""

import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks
from transformers import AutoConfig

from llmq.checkpoint.reader import CONFIG, Checkpoint
from llmq.core.errors import CheckpointError, first_line
from llmq.models.experts import expert_linears
from llmq.models.model_class import model_class
from llmq.models.model_files import ModelFiles
from llmq.models.stored_names import tied_names, untie_own

# Largest values of counts, by what their names contain. Config classes make lists of such lengths (kinds of layers,
# names of labels) before anything is built.
_COUNTS = {
    # A million: Gemma 3n has a vocabulary "per layer".
    re.compile(r"layer|depth|block|stage|expert|dense|indices|heads"): 1_000_000,
    re.compile(r"label|class"): 10_000,  # each label gets a name
}
_MODULES_PER_TENSOR = 20  # a block of Llama has 15 modules and 9 tensors or more; some models add dropouts
_BYTES_OF_EXPERT = 256  # in float, of one linear. Tests have some with 4 kB
_SPARE = 1 << 28  # bytes of buffers that no file holds: masks, rotary frequencies


def model_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """Return the model's configuration without its quantization_config, for which transformers wants other packages.

    Raises CheckpointError if it describes no model, or one that the files cannot hold.
    """
    return checked_config(checkpoint, trust_remote_code)[0]


def checked_config(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, bool]:
    """Return `model_config`, and whether its model ran on the meta device."""
    directory, files = checkpoint.directory, checkpoint.files
    stored = sum(files.nbytes(name) for name in files.names())
    try:
        _refuse_absurd(checkpoint.config)
        if "configuration_files" in checkpoint.config:  # transformers would open these instead
            raise ValueError("it names other configuration files")
        if checkpoint.gguf is not None:
            config = deepcopy(checkpoint.gguf.source.config)
        else:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        depth = config.get_text_config().num_hidden_layers
        if not 0 < depth <= len(files.names()):
            raise ValueError(f"it has {depth} blocks, but the files hold {len(files.names())} tensors")
        # A checkpoint must not choose which code computes attention (some names are fetched from the hub), nor what a
        # model returns.
        config.output_attentions, config.return_dict = False, True
        config._attn_implementation = config._experts_implementation = None  # pyright: ignore[reportPrivateUsage]
        # A weight takes two bits at least: a byte holds four.
        with torch.device("meta"), _bounded(len(files.names()), 4 * stored):
            model: Any = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes raise what they like
        raise CheckpointError(
            f"{directory}: {CONFIG} describes no model that can be built: {first_line(error)}"
        ) from None
    if tied_names(model) and untie_own(model, ModelFiles(files, model)):
        with torch.device("meta"):
            model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    refuse_more_experts(checkpoint, model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > 4 * stored + _SPARE:
        raise CheckpointError(f"{directory}: {CONFIG} describes {buffers} bytes of buffers; all files have {stored}")
    return config, failure(model.eval(), torch.device("meta")) is None


def refuse_more_experts(checkpoint: Checkpoint, model: Any) -> None:
    """Raise CheckpointError if a model has more linears in its experts than the files could hold.

    A packed linear takes a tensor or more. Those in float may lie in one tensor, but take some bytes each.
    """
    files, linears = checkpoint.files, expert_linears(model)
    stored = sum(files.nbytes(name) for name in files.names())
    if linears > len(files.names()) + stored // _BYTES_OF_EXPERT:
        fault = f"{linears} linears of experts; all files have {len(files.names())} tensors in {stored} bytes"
        raise CheckpointError(f"{checkpoint.directory}: {CONFIG} describes {fault}")


def failure(model: Any, device: torch.device) -> str | None:
    """Run the model on two tokens and return the first line of its error; None if it runs.

    Some wrong settings only show when a model runs.
    """
    try:
        with torch.no_grad(), device:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits.size()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code
        return first_line(error)
    return None


def _refuse_absurd(config: Any) -> None:
    """Raise ValueError if a count anywhere in a parsed config.json is larger than that of any model."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:  # no recursion: strangers choose how deep it is nested
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(name, inner) for inner in value]
        elif isinstance(value, int | float):
            most = min((most for names, most in _COUNTS.items() if names.search(name)), default=None)
            if most is not None and not abs(value) <= most:
                raise ValueError(f"{name} is more than {most}")


@contextmanager
def _bounded(tensors: int, weights: int) -> Generator[None]:
    """Raise ValueError when this thread builds too many modules for `tensors`, or a tensor of more than `weights`."""
    mine, most = threading.get_ident(), 1000 + _MODULES_PER_TENSOR * tensors
    built = 0

    def count(parent: nn.Module, name: str, child: object) -> None:  # noqa: ARG001
        nonlocal built
        if threading.get_ident() != mine:
            return
        built += 1
        if built > most:
            raise ValueError(f"it describes more than {most} modules, but the files hold {tensors} tensors")
        if isinstance(child, Tensor) and child.numel() > weights:
            raise ValueError(f"it describes a tensor of {child.numel()} weights, more than all files could hold")

    with (
        torch_hooks.register_module_module_registration_hook(count),
        torch_hooks.register_module_parameter_registration_hook(count),
        torch_hooks.register_module_buffer_registration_hook(count),
    ):
        yield
