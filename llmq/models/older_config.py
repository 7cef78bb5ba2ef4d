"""Entries of config.json that transformers 5 has renamed, under the names that other readers still want."""

from collections.abc import Mapping
from typing import Any


def with_older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that also has the rotary settings of its `rope_parameters` under their older names.

    mistralrs 0.9.5 and many models of mlx_lm 0.32.2 look for these only. What the config says already stays.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # one for each kind of attention has no older entry
        return dict(config)
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {} if rope.get("rope_type", "default") == "default" else {"rope_scaling": rope}
    return {**older, **scaling, **config}
