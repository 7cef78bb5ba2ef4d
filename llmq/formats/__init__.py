"""The checkpoint formats by name. Each is a module of pure functions: encode, decode, hf_config, schemes_of."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import auto_round, awq, compressed_tensors, gptq, int_quantized, mlx
from llmq.formats.scheme import Scheme, Schemes


@runtime_checkable  # the tests check annotations as they run
class Format(Protocol):
    """What the module of a format holds.

    TENSOR_SUFFIXES: the tensors of a packed linear. If the first one exists, the linear is packed.
    """

    @property
    def METHOD(self) -> str: ...  # noqa: N802
    @property
    def TENSOR_SUFFIXES(self) -> tuple[str, ...]: ...  # noqa: N802

    encode: Callable[[str, QuantizedWeight, Scheme], dict[str, Tensor]]
    decode: Callable[[str, Mapping[str, Tensor], Scheme], QuantizedWeight]
    hf_config: Callable[[Schemes, list[str]], dict[str, Any]]
    schemes_of: Callable[[Mapping[str, Any], Iterable[str]], dict[str, Scheme]]


FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "mlx": mlx,
}
"""The formats of directories that llmq writes and reads. A .gguf file is another kind of thing; see gguf.py."""

CONVERTED = FORMATS | {int_quantized.METHOD: int_quantized}
"""The formats that llmq.convert writes."""
ROUNDING = (compressed_tensors.METHOD, int_quantized.METHOD)
"""Those that can say that inputs are rounded to 8 bits."""


def method_of(config: Mapping[str, Any]) -> Any:
    """Return the method that a quantization_config names. MLX's is the one that names none."""
    return config.get("quant_method", mlx.METHOD if {"group_size", "bits"} <= config.keys() else None)


def format_of(config: Mapping[str, Any]) -> Format:
    """Return the format of the tensors of a checkpoint with this quantization_config.

    Raises CheckpointError for a method that llmq does not read.
    """
    method = method_of(config)
    if method == auto_round.METHOD:
        return FORMATS[auto_round.packed_as(config)]
    if method == compressed_tensors.METHOD and config.get("format") == int_quantized.METHOD:
        return int_quantized
    if not isinstance(method, str) or method not in FORMATS:
        known = ", ".join([*FORMATS, auto_round.METHOD])
        raise CheckpointError(f"quantization method {str(method)[:80]!r} is not one of {known}")
    return FORMATS[method]


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each named linear. Raises CheckpointError for a config that llmq does not read."""
    if config.get("quant_method") == auto_round.METHOD:
        return auto_round.schemes_of(config, names)
    return format_of(config).schemes_of(config, names)
