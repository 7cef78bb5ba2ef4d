"""Chooses the class that runs a model: a causal language model, or the wrapper of one that also sees pictures."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto

_CLASSES: tuple[tuple[Any, Mapping[Any, Any]], ...] = (
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForMultimodalLM, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
)


def model_class(config: Any) -> Any:
    """Return one of transformers' Auto classes. Its `from_config` builds the model that config.json describes.

    The class named under `architectures` counts: Qwen3.5's config would also build its text model alone, without the
    tower for pictures.
    """
    named = set(getattr(config, "architectures", None) or ())
    known = [(auto, _names(names.get(config.model_type))) for auto, names in _CLASSES]
    for auto, names in known:
        if named & names:
            return auto
    return next((auto for auto, names in known if names), AutoModelForCausalLM)


def _names(found: Any) -> set[str]:
    return set() if found is None else {found} if isinstance(found, str) else set(found)
