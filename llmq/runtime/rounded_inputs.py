"""Rounds what enters the packed linears of a model to 8 bits, as an engine with 8-bit matmuls does (W4A8, W8A8)."""

from typing import Any

from torch import Tensor, nn

from llmq.core.errors import RequestError
from llmq.runtime.packed_linear import PackedLinear
from llmq.training.fake_quantization import per_token


def round_inputs(model: Any) -> None:
    """Round the inputs of all packed linears to 8 bits; of an original model, of all linears in its blocks.

    Each token has its own scale, unless the checkpoint has one for the linear.

    The embeddings and the linear that predicts words (lm_head) compute as before.

    Raises RequestError if the model has no linears.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for linear in packed:
        linear.rounds_inputs = True
        linear.changed()
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not packed and not linears:
        raise RequestError("activations of 8 bits are for linears, and this model has none")
    for linear in linears if not packed else ():
        linear.register_forward_pre_hook(_rounded)


def _rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (per_token(inputs[0]), *inputs[1:])
