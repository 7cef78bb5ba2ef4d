"""What is refused of a request to train before anything is written: it would fail, or be ignored, only hours later."""

import importlib.util
from typing import Any

import torch

from llmq.calibration.texts import windows
from llmq.checkpoint.reader import Checkpoint
from llmq.core.config import FORMATS, QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.settings import TENSOR, TOKEN
from llmq.core.train_config import TrainConfig
from llmq.formats import ROUNDING
from llmq.models.decoder_blocks import find_blocks
from llmq.models.experts import layouts
from llmq.models.model_source import ModelSource
from llmq.models.stock_loading import unreadable

_OF_ORIGINALS = ("bits", "group_size", "symmetric", "start", "format")
_OF_CALIBRATION = ("calibration", "calibration_samples")


def check_useful(config: TrainConfig, is_packed: bool) -> None:
    """Raise RequestError for settings that would have no effect."""
    follows = config.needs_original or config.learn != "scales"
    reasons = {
        "a packed checkpoint has its own": _OF_ORIGINALS if is_packed else (),
        "it is for the start of an original model, and for --lora": (
            _OF_CALIBRATION if is_packed and not config.lora else ()
        ),
        "an original model is its own": () if is_packed else ("original",),
        "only --loss kl and both, and --learn codes and all, look at it": () if follows else ("original",),
        "it is for --lora": () if config.lora else ("lora_rate",),
        "codes do not learn here": () if config.learn != "scales" else ("rate",),
        "only --learn all trains what is not packed": () if config.learn == "all" else ("outside_rate",),
        "adapters alone learn with --lora": ("scale_rate",) if config.lora else (),
    }
    for reason, names in reasons.items():
        for name in names:
            if getattr(config, name) != getattr(TrainConfig, name):
                raise RequestError(f"{name.replace('_', ' ')} has no effect: {reason}; leave it out")


def check_packed(config: TrainConfig, checkpoint: Checkpoint, skeleton: Any) -> None:
    """Raise RequestError if a packed checkpoint cannot be trained as asked."""
    view = checkpoint.for_model(skeleton)
    if config.activations == 8:
        symmetric = all(scheme.symmetric for scheme in view.schemes.values())
        _check_rounds_inputs(checkpoint.format.METHOD, symmetric)
    for name, scheme in view.schemes.items():
        columns = skeleton.get_submodule(name).in_features
        if scheme.act_order or (scheme.group_size > 0 and columns % scheme.group_size):
            what = "spread over the row (desc_act)" if scheme.act_order else "not all of one size"
            raise RequestError(f"{name}: groups that are {what} cannot be trained; quantize the model again")
    if config.inputs == TENSOR:
        _check_static(skeleton)
        if any(scheme.rounded_inputs == TOKEN for scheme in view.schemes.values()):
            raise RequestError("the checkpoint has a scale for each token, which it keeps; leave out activation scheme")
    if config.lora:
        _check_mergeable(checkpoint, view, skeleton)


def _check_rounds_inputs(method: str, symmetric: bool) -> None:
    """Raise RequestError if a format, or weights with zero points, cannot stand beside inputs of 8 bits."""
    if not symmetric:
        raise RequestError(
            "zero points are refused beside 8-bit inputs: int8 products of engines take only symmetric weights; leave "
            "out --activations, or --no-symmetric when the model is quantized"
        )
    if method not in ROUNDING:
        raise RequestError(
            f"{method} cannot say that inputs are rounded to 8 bits; use compressed-tensors, or leave out --activations"
        )


def _check_static(skeleton: Any) -> None:
    """Raise RequestError for a mixture of experts: vLLM's int8 kernel for experts takes no stored scales."""
    if layouts(skeleton):
        raise RequestError("activation scheme static is for models without experts; use dynamic")


def _check_mergeable(checkpoint: Checkpoint, view: Checkpoint, skeleton: Any) -> None:
    """Raise RequestError if llmq.quantize could not make such a checkpoint again of the sum with adapters."""
    if importlib.util.find_spec("peft") is None:
        raise RequestError("LoRA needs the package peft: pip install peft")
    blocks, fault = find_blocks(skeleton), None
    if checkpoint.format.METHOD not in FORMATS:
        fault = f"its format is {checkpoint.format.METHOD}"
    elif not all(name.startswith(tuple(f"{block}." for block in blocks)) for name in view.linears):
        fault = "layers outside of its blocks are packed"
    elif not all(any(name.startswith(f"{block}.") for name in view.linears) for block in blocks):
        fault = "some of its blocks are not packed"
    elif any(scheme.rounded_inputs == TENSOR for scheme in view.schemes.values()):
        fault = "its inputs have one scale for all tokens"
    elif len({(scheme.group_size, scheme.symmetric) for scheme in view.schemes.values()}) > 1:
        fault = "its layers have several group sizes, or zero points only in some"
    elif unreadable(skeleton, view.model_files, lambda _: True) and checkpoint.format.METHOD in ROUNDING:
        fault = "stock transformers does not open it"
    if fault is not None:
        raise RequestError(f"adapters cannot be merged into this checkpoint again: {fault}; use --learn scales")


def check_original_start(config: TrainConfig, source: ModelSource, start: QuantizeConfig) -> None:
    """Raise RequestError if an original model cannot be quantized and trained as asked."""
    if config.lora:
        raise RequestError(
            "lora needs a packed checkpoint, beside which its adapters can be used: run llmq.quantize before, and give "
            "its output as --model"
        )
    if config.activations == 8:
        fault = unreadable(source.skeleton, source.files, lambda _: True)
        _check_rounds_inputs("gptq" if fault else start.stored_as, config.symmetric)
    if config.inputs == TENSOR:
        _check_static(source.skeleton)
    if config.start != "rtn":
        check_text_is_enough(start, source.tokenizer)


def check_text_is_enough(request: QuantizeConfig, tokenizer: Any) -> None:
    """Raise RequestError if the text of a calibration is too short."""
    try:
        windows(tokenizer, request.calibration_settings)
    except RequestError as error:
        raise RequestError(str(error).replace("--samples", "--calibration-samples")) from None


def check_original(source: ModelSource, skeleton: Any, names: list[str]) -> None:
    """Raise RequestError if a model is not the one that a packed checkpoint was made from."""
    words, own = (each.get_input_embeddings().num_embeddings for each in (source.skeleton, skeleton))
    if words != own:
        raise RequestError(f"the original has {words} words, and the packed checkpoint {own}: it is another model")
    for name in names:
        try:
            shape = source.skeleton.get_submodule(name).weight.shape
        except AttributeError:
            shape = torch.Size()
        if shape != skeleton.get_submodule(name).weight.shape:
            raise RequestError(f"{name} of the original is {tuple(shape)}: it is another model")
