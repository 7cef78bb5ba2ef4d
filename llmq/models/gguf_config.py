"""What a GGUF file says of a model and transformers does not look at: rotary frequencies, the size of experts."""

import math
from typing import Any


def complete_config(config: Any, reader: Any) -> None:
    """Give a config what a GGUF file says of the model and transformers does not look at. Raises whatever it meets."""
    _set_rope(config, reader)
    size = reader.fields.get(f"{reader.fields['general.architecture'].contents()}.expert_feed_forward_length")
    if size is not None and hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = int(size.contents())


def _set_rope(config: Any, reader: Any) -> None:
    """Give a config the rotary frequencies that a GGUF file holds as tensors.

    rope_freqs.weight (Llama 3.1) divides each frequency. rope_factors_short.weight and rope_factors_long.weight (Phi-3)
    do so for texts within the original context and for longer ones.
    """
    kinds = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
    factors = {t.name.removesuffix(".weight"): t.data.tolist() for t in reader.tensors if t.name in kinds}
    if not factors:
        return
    of_all = factors.get("rope_freqs", [])
    rope = dict(config.rope_parameters)
    for factor in (8.0, 32.0):  # of Llama 3.1 and 3.2, which engines know by this name
        wanted = _llama3(rope["rope_theta"], len(of_all), factor)
        if of_all and all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(of_all, wanted, strict=True)):
            kind = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            config.rope_parameters = rope | kind | {"original_max_position_embeddings": _LLAMA3_CONTEXT}
            return
    scaling = f"{reader.fields['general.architecture'].contents()}.rope.scaling"
    context = reader.fields.get(f"{scaling}.original_context_length")
    attention = reader.fields.get(f"{scaling}.attn_factor")
    config.rope_parameters = rope | {
        "rope_type": "longrope",
        "short_factor": factors.get("rope_factors_short", of_all),
        "long_factor": factors.get("rope_factors_long", of_all),
        "factor": 1.0,
        "attention_factor": 1.0 if attention is None else float(attention.contents()),
        "original_max_position_embeddings": config.max_position_embeddings
        if context is None
        else int(context.contents()),
    }


_LLAMA3_CONTEXT = 8192


def _llama3(theta: float, count: int, factor: float) -> list[float]:
    """Return what Llama 3.1 divides its frequencies by: 1 for short waves, `factor` for long ones, and between them."""
    divisors: list[float] = []
    for i in range(count):
        waves = _LLAMA3_CONTEXT / (2 * math.pi * theta ** (i / count))  # in the original context
        smooth = min(1.0, max(0.0, (waves - 1) / 3))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors
