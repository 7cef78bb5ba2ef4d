"""MLX's affine quantization: read by mlx_lm, and by all that is built on MLX (LM Studio, mlx-swift).

    NAME.weight  uint32 [out, in*bits/32]  codes along the inputs, one bit stream per row
    NAME.scales  float [out, groups]
    NAME.biases  float [out, groups]       -scale * zero

w = scale * q + bias. MLX keeps no zero points, so only those are stored that come back: where -scale * zero is a number
in the dtype of the scales. It is for every symmetric weight, whose zero point is a power of two, and for the real zero
points of affine_grid.py, which are made from stored biases. A linear in float has a NAME.weight as well, so NAME.scales
is what marks a packed one. mlx 0.32.4 and mlx-lm 0.32.2 are in `make interop`.

mlx_lm stacks the experts of a block: `experts.{0, 1, …}.up_proj.scales` become `switch_mlp.up_proj.scales`, or in a few
models `experts.up_proj.scales`. For most models it does so itself when it opens a file. For a few it stacks only the
weights, not the scales: see STACKED.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.core.affine_grid import bias_of, zero_of
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import MLX_GROUPS, listed
from llmq.formats.packing import pack_stream, packed_length, unpack_stream
from llmq.formats.scheme import Scheme, Schemes, checked, entry, expect_scales, expect_words, part_of
from llmq.models.older_config import with_older_rope

METHOD = "mlx"
SETTINGS = "quantization"  # entry of config.json where MLX looks for what other tools keep in quantization_config
TENSOR_SUFFIXES = ("scales", "weight", "biases")
STACKED = ("qwen3_moe", "ernie4_5_moe", "granitemoe", "mellum")
"""Types of models of which mlx_lm 0.32.2 finds packed experts only if they are stacked in the file (its `sanitize`)."""
_MODE = "affine"
_EXPERT = re.compile(r"(.+)\.experts\.([0-9]{1,6})\.(\w+)")
_STACKS = ".switch_mlp.", ".experts."  # what mlx_lm calls them in most models, and in AFMoE and dots1
_STACK = re.compile(r"(.+)\.(?:switch_mlp|experts)\.([a-z]\w*\.(?:weight|scales|biases))")
_IN_MLX = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def encode(name: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of one linear by their full names. The weight is not changed.

    Raises CheckpointError for what the format cannot store: groups of other sizes or spread over the row, zero points
    that are lost in the biases.
    """
    if name.endswith(".kv_b_proj"):
        raise CheckpointError(f"{name}: mlx_lm rounds this layer of latent attention once more; use another format")
    if weight.group_of is not None:
        raise CheckpointError(f"{name}: mlx stores contiguous groups of one size; use gptq for others")
    if weight.group_size not in MLX_GROUPS or weight.group_size != scheme.group_size:
        fits = next((size for size in MLX_GROUPS[::-1] if weight.q.shape[1] % size == 0), None)
        advice = "no other fits" if fits is None else f"quantize again with --group-size {fits}"
        what = "whole rows" if weight.scale.shape[1] == 1 else str(weight.group_size)
        raise CheckpointError(f"{name}: mlx stores groups of {listed(MLX_GROUPS)}, not {what}; {advice}")
    scale = weight.scale.contiguous()
    biases = bias_of(scale, weight.zero.double())
    # The sizes of a file are found out on the meta device, where there are no numbers.
    if not scale.is_meta and not _come_back(scale, biases, weight.zero.double()):
        dtype = str(scale.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name}: mlx stores -scale * zero, which {dtype} cannot hold here; use another format")
    return {
        f"{name}.weight": pack_stream(weight.q, weight.bits).view(torch.uint32),
        f"{name}.scales": scale,
        f"{name}.biases": biases,
    }


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """Return the weight that `encode` or another tool wrote. Its zero points are codes, if all of them can be.

    Raises CheckpointError if tensors are missing or do not fit together.
    """
    words, scales, biases = (part_of(name, tensors, suffix) for suffix in ("weight", "scales", "biases"))
    if words.dtype != torch.uint32 or words.ndim != 2 or not words.numel() or 32 * words.shape[1] % scheme.bits:
        found = f"{words.dtype} {tuple(words.shape)}"
        raise CheckpointError(f"{name}.weight: expected uint32 rows of {scheme.bits}-bit codes, found {found}")
    rows, columns = words.shape[0], 32 * words.shape[1] // scheme.bits
    if columns % scheme.group_size:
        raise CheckpointError(f"{name}: group size {scheme.group_size} does not divide {columns} inputs")
    expect_words(f"{name}.weight", words.view(torch.int32), (rows, packed_length(columns, scheme.bits)))
    for suffix, grid in (("scales", scales), ("biases", biases)):
        expect_scales(f"{name}.{suffix}", grid, (rows, columns // scheme.group_size))
    if bool(((scales == 0) & (biases != 0)).any()):
        raise CheckpointError(f"{name}: a scale is 0 beside a bias that is not")
    # A group of zeros needs no zero point.
    zero = torch.where(scales == 0, 2 ** (scheme.bits - 1), zero_of(scales, biases))
    codes = unpack_stream(words.view(torch.int32), scheme.bits, columns)
    return checked(name, QuantizedWeight(codes, scales, zero, scheme.bits).with_codes_as_zeros(), scheme)


def _come_back(scale: Tensor, biases: Tensor, zero: Tensor) -> bool:
    """Tell whether a reader finds these zero points. `zero`: float64."""
    return bool(((biases.double() == -scale.double() * zero) | (zero_of(scale, biases) == zero)).all())


def hf_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:  # noqa: ARG001 what has no scales is in float
    """Return what config.json holds as `quantization`, and as `quantization_config` for tools of the hub.

    Layers that differ from most have entries of their own. mlx_lm 0.32.2 finds them out from the sizes of the tensors;
    other readers need the entries.
    """
    most = max(schemes.values(), key=list(schemes.values()).count)
    return _settings(most) | {
        _module(name): _settings(schemes[name]) for name in sorted(schemes) if schemes[name] != most
    }


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with these settings where mlx_lm looks for them.

    transformers 5 writes the base of the rotary frequencies into `rope_parameters`. mlx_lm 0.32.2 looks for it there in
    17 of its models; Llama, Qwen2 and Mixtral silently take a default. So the older entries are written, too.
    """
    text = {key: with_older_rope(config[key]) for key in ("text_config",) if isinstance(config.get(key), dict)}
    return with_older_rope(config) | text | {SETTINGS: settings}


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each packed linear.

    The config does not say which weights are symmetric, so none is said to be. Raises CheckpointError for other modes
    (mxfp4, nvfp4, mxfp8) and for packed linears that the config leaves in float.
    """
    most, schemes = _scheme(METHOD, config), dict[str, Scheme]()
    for name in names:
        module = _module(name)
        own = next((config[each] for each in (name, module, module.replace(*_STACKS)) if each in config), True)
        if own is False:
            raise CheckpointError(f"{name} is packed, although the config leaves it in float")
        schemes[name] = most if own is True else _scheme(name, own)
    return schemes


def stack_of(name: str) -> tuple[str, int] | None:
    """Return the stack that a tensor of an expert belongs to, and the expert's number; None for any other tensor."""
    linear, _, suffix = name.rpartition(".")
    found = _EXPERT.fullmatch(linear) if suffix in TENSOR_SUFFIXES else None
    return None if found is None else (f"{_module(linear)}.{suffix}", int(found[2]))


def in_stack(name: str) -> tuple[str, str] | None:
    """Return what stands before and after the number in the names of a stack's parts; None if it is no stack."""
    found = _STACK.fullmatch(name)
    return None if found is None else (f"{found[1]}.experts.", f".{found[2]}")


def stacked(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Return the tensors of a model as its file holds them: experts are stacked if its type is in STACKED."""
    found = {name: stack_of(name) if model_type in STACKED else None for name in tensors}
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, place in found.items():
        if place is not None:
            parts[place[0]][place[1]] = tensors[name]
    stacks = {name: torch.stack([each[number] for number in sorted(each)]) for name, each in parts.items()}
    return {name: tensor for name, tensor in tensors.items() if found[name] is None} | stacks


def _module(linear: str) -> str:
    """Return the name that the module of a linear has in MLX."""
    found = _EXPERT.fullmatch(linear)
    return linear if found is None else f"{found[1]}.switch_mlp.{_IN_MLX.get(found[3], found[3])}"


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": _MODE}


def _scheme(name: str, settings: Any) -> Scheme:
    """Return the scheme of an entry; the defaults are MLX's. Raises CheckpointError for what llmq does not read."""
    if not isinstance(settings, Mapping) or entry(settings, "mode", default=_MODE) != _MODE:
        raise CheckpointError(f"{name}: of MLX's modes llmq reads {_MODE}; found {str(settings)[:80]}")
    scheme = Scheme.of(entry(settings, "bits", default=4), entry(settings, "group_size", default=64), False)
    if scheme.group_size not in MLX_GROUPS:
        raise CheckpointError(
            f"{name}: MLX has groups of {listed(MLX_GROUPS)}; its config says {str(scheme.group_size)[:20]}"
        )
    return scheme
