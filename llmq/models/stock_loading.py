"""Whether stock transformers finds the packed linears of a model again in compressed-tensors."""

from collections.abc import Callable
from typing import Any

from llmq.models.conv1d import CONV1D, stored_transposed
from llmq.models.experts import layouts, linears_of
from llmq.models.model_files import ModelFiles

EXPERTS = (
    "transformers finds no packed experts of {} in compressed-tensors: it would put random weights there; choose "
    "--format gptq (2, 3, 4, 8 bit)"
)
ZEROS = (
    "transformers reads no zero points of packed experts in compressed-tensors; choose --format awq (4 bit) or gptq "
    "(2, 3, 4, 8 bit)"
)


def unreadable(model: Any, files: ModelFiles, symmetry: Callable[[str], bool | None]) -> str | None:
    """Return why stock transformers cannot open the linears of a model as compressed-tensors; None if it can.

    `symmetry`: whether the linear of this name has no zero points; None if it is not packed.

    transformers opens packed experts if its table merges single ones, or if it replaces the module that holds them.
    """
    if stored_transposed(model):
        return CONV1D
    # Imported here for the reason in renamed_files.py.
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REPLACED

    for name, layout in layouts(model).items():
        kind = REPLACED.get(type(model.get_submodule(name)).__name__, {"quantization_methods": []})
        if "compressed-tensors" in kind["quantization_methods"]:
            continue
        linears = [f"{name}.{expert}.{inner}" for expert in range(layout.experts) for inner in linears_of(layout)]
        packed = [linear for linear in linears if symmetry(linear) is not None]
        if not all(map(files.is_merged, packed[: len(linears_of(layout))])):
            return EXPERTS.format(type(model).__name__)
        if not all(map(symmetry, packed)):
            return ZEROS
    return None
