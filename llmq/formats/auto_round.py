"""AutoRound's own checkpoints, read only. They hold GPTQ or AWQ tensors, and the config says which.

packing_format            tensors        zero points
auto_round:auto_gptq      gptq           zero - 1
auto_round:gptqmodel      gptq           as they are
auto_round                gptq           as they are
auto_round:auto_awq       awq            as they are
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmq.core.errors import CheckpointError
from llmq.core.settings import GPTQ_BITS
from llmq.formats.name_patterns import Patterns
from llmq.formats.scheme import Scheme, entry, tables, with_known_bits

METHOD = "auto-round"
_PACKINGS = {
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round:gptq": ("gptq", 1),
    "auto_round": ("gptq", 0),
    "auto_round:auto_awq": ("awq", 0),
    "auto_round:awq": ("awq", 0),
}
_NAME = re.compile(r"[\w.-]+")
_OVERRIDES = {"bits": "bits", "group_size": "group_size", "sym": "symmetric"}


def packed_as(config: Mapping[str, Any]) -> str:
    """Return the name of the format of the tensors. Raises CheckpointError for an unknown packing."""
    return _packing(config)[0]


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Return the scheme of each packed linear. In `extra_config` an exact name wins over a pattern.

    Raises CheckpointError for data types other than int, and for packings that llmq does not read.
    """
    if entry(config, "data_type", default="int") != "int" or entry(config, "act_bits", default=16) not in (16, 32):
        raise CheckpointError("of AutoRound's data types only int weights with float activations are read")
    # AutoRound's own default of sym is true.
    symmetric = entry(config, "sym", default=True)
    size, offset = entry(config, "group_size", default=128), _packing(config)[1]
    most = Scheme.of(config.get("bits", 4), size, symmetric, zero_offset=offset)
    extra, patterns = tables("extra_config", entry(config, "extra_config", default={})), Patterns()
    # AutoRound's patterns have wildcards. A plain name is no pattern: mlp.gate must not fit mlp.gate_proj.
    expressions = [key for key in extra if not _NAME.fullmatch(key)]
    fitting = {name: next((key for key in expressions if patterns.search(key, name)), None) for name in names}
    changes = {name: extra.get(name, extra.get(pattern or "", {})) for name, pattern in fitting.items()}
    schemes = {name: _changed(name, most, changes[name]) for name in changes}
    return with_known_bits(METHOD, schemes, GPTQ_BITS)


def _changed(name: str, most: Scheme, changes: dict[str, Any]) -> Scheme:
    """Return the scheme of a linear after its changes. Raise CheckpointError if they leave it in float."""
    if entry(changes, "data_type", default="int") != "int" or entry(changes, "bits", default=4) == 16:
        raise CheckpointError(f"{name} is packed, although extra_config says it is not")
    return most.changed({field: changes[key] for key, field in _OVERRIDES.items() if changes.get(key) is not None})


def _packing(config: Mapping[str, Any]) -> tuple[str, int]:
    """Return the format of the tensors, and what its zero points lack."""
    packing = str(entry(config, "packing_format", "backend", default="auto_round:auto_gptq"))
    if packing not in _PACKINGS:
        raise CheckpointError(f"AutoRound packing {packing!r} is not one of {', '.join(_PACKINGS)}")
    return _PACKINGS[packing]
