"""What a model to quantize must not be, and what its files hold besides its weights."""

from pathlib import Path
from typing import Any

from llmq.core.errors import CheckpointError, RequestError
from llmq.models.safetensors_files import TensorFiles
from llmq.models.stored_names import has_no_place, is_computed


def without_rescaling(config: Any) -> dict[str, Any]:
    """Turn off what RWKV does against overflow in float16, and return the changed settings.

    It divides weights of its later blocks by powers of two, and hidden states as well. The logits are the same.
    """
    if not getattr(config, "rescale_every", 0):
        return {}
    config.rescale_every = 0
    return {"rescale_every": 0}


def refuse_quantized(config: Any, path: Path) -> None:
    quantized = getattr(config, "quantization_config", None) or getattr(config, "quantization", None)  # MLX's entry
    if quantized is not None:
        method = quantized.get("quant_method", "mlx") if isinstance(quantized, dict) else type(quantized).__name__
        raise RequestError(f"{path} is quantized already ({method}); start from the original weights")


def refuse_missing(wanted: list[str], files: TensorFiles, path: Path) -> None:
    missing = sorted(set(wanted) - files.names())
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors the model needs, {missing[0]} among them; "
            "it is incomplete, or stores them under other names"
        )


def refuse_float8(names: list[str], files: TensorFiles, path: Path) -> None:
    for name in names:
        dtype = files.dtype(name)
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise RequestError(
                f"{path} is quantized already: it holds {name} in {str(dtype).removeprefix('torch.')}, although its "
                "config.json does not say so; start from the original weights"
            )


def carried_names(model: Any, files: TensorFiles, path: Path) -> list[str]:
    """Return the names of stored tensors that the model has no place for. Raises CheckpointError for misplaced ones."""
    others = [name for name in sorted(files.names() - model.state_dict().keys()) if not is_computed(model, name)]
    misplaced = [name for name in others if not has_no_place(model, name)]
    if misplaced:
        raise CheckpointError(
            f"{path} holds {misplaced[0]}, which the model that config.json describes does not use; "
            "the result would compute something else. Correct config.json, or remove the tensor"
        )
    return others
