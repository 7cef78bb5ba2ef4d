"""GPT-2's Conv1D is a linear whose weight lies transposed, [in, out]. llmq makes it the nn.Linear that engines run."""

from collections.abc import Container
from typing import Any

import torch
from torch import nn

CONV1D = (
    "this model is made of Conv1D, and transformers opens compressed-tensors only for nn.Linear: it would put random "
    "weights there; choose --format gptq (2, 3, 4, 8 bit)"
)


def linears_for_conv1d(model: Any, names: Container[str] | None = None) -> None:
    """Replace each Conv1D of a model by a linear on the meta device. `names`: only these; None: all.

    vLLM transposes a `weight` of GPT-2, but not its packed tensors: these lie as those of any other linear.
    """
    from accelerate import init_empty_weights  # here for the reason in model_files.py
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if type(module) is Conv1D and (names is None or name in names):
            inputs, outputs = module.weight.shape
            with init_empty_weights():
                linear: Any = nn.Linear(inputs, outputs, dtype=torch.float32)
            linear.is_stored_transposed = True
            model.set_submodule(name, linear.requires_grad_(False))


def stored_transposed(model: nn.Module) -> set[str]:
    """Return the names of weights that the files hold transposed."""
    return {f"{name}.weight" for name, m in model.named_modules() if getattr(m, "is_stored_transposed", False)}
