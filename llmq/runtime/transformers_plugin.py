"""llmq as a quantization method of transformers: it opens and saves packed checkpoints of every format llmq reads.

    config = AutoConfig.from_pretrained(DIR)
    config.quantization_config = {"quant_method": "llmq"}
    model = AutoModelForCausalLM.from_pretrained(DIR, config=config)

gives the model of `llmq.load(DIR)` and needs no other quantization package. Without the second line transformers asks
for the package of the format that config.json names. If the weights have an old name, such as
gptq_model-4bit-128g.safetensors, set `config.transformers_weights` to it.

`save_pretrained` of such a model, or of one from `llmq.load`, writes the packed tensors as they were read. config.json
names their own format, never `llmq`, which no other tool could read. AutoRound's checkpoints become plain gptq or awq.
GPTQ zero points are written as llmq writes them: v1 for symmetric weights, v2 for others. quantize_config.json is not
written: transformers has no way to do so, and readers of GPTQ checkpoints look into config.json without it.
"""

# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.mlx_files import MlxFiles
from llmq.checkpoint.module_matching import check_fit, replace_linears
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, RequestError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import compressed_tensors, format_of, mlx
from llmq.formats.scheme import Scheme
from llmq.models.conv1d import linears_for_conv1d, stored_transposed
from llmq.models.experts import experts_to_linears, layouts
from llmq.models.model_files import ModelFiles
from llmq.models.packable import config_names
from llmq.runtime.model_config import refuse_more_experts
from llmq.runtime.packed_experts import group_experts
from llmq.runtime.packed_linear import PackedLinear
from llmq.runtime.plugin_experts import (
    expert_in,
    load_experts,
    merge_experts,
    reserve,
    reserved_on,
    return_experts,
    take_experts,
)

METHOD = "llmq"
_NOT_OFFLOADED = "packed weights are not offloaded; choose a device_map without disk, and with either cpu or GPUs"


def attach(model: Any, checkpoint: Checkpoint) -> None:
    """Let `save_pretrained` of a model write the format that it was loaded from."""
    quantizer = LlmqQuantizer(LlmqConfig())
    quantizer.remember(checkpoint)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config


class LlmqConfig(QuantizationConfigMixin):
    """A request for this method; after loading, it holds the quantization_config of the checkpoint's format.

    Other keys of a request are ignored: the directory says how its tensors are packed.
    """

    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.stored: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of config.json."""
        return {"quant_method": METHOD} if self.stored is None else copy.deepcopy(self.stored)


class LlmqQuantizer(HfQuantizer):
    """The methods that transformers calls while it opens and saves a model."""

    requires_calibration = True  # this tells transformers: for packed checkpoints only

    def __init__(self, quantization_config: LlmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: LlmqConfig
        self._schemes: dict[str, Scheme] = {}
        self._files: ModelFiles | None = None
        # While a model is being opened: its files, the tensors to take from them, its experts, a setting to restore.
        self._opened: tuple[Checkpoint, set[str], dict[str, nn.Module], Any] | None = None

    def remember(self, checkpoint: Checkpoint) -> None:
        """Keep what saving needs besides the model."""
        self._schemes, self._files, stored = checkpoint.schemes, checkpoint.model_files, checkpoint.quantization
        if checkpoint.gguf is not None:  # transformers writes directories only
            stored = compressed_tensors.hf_config(checkpoint.schemes, [])
        self.quantization_config.stored = stored

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise RequestError if weights would be offloaded to a disk or a CPU. "auto" is checked after loading."""
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise RequestError(_NOT_OFFLOADED)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # packed weights never change, but gradients flow through them to adapters

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        """Remove the weights of packed linears, so that transformers loads only the other tensors.

        Raises CheckpointError if the files lack one of those: transformers would continue with random weights.
        """
        if not checkpoint_files:
            raise RequestError("from_pretrained got a state_dict, but llmq opens packed checkpoints only from files")
        checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        if isinstance(checkpoint.files, MlxFiles) and checkpoint.files.dense:
            what = f"{next(iter(checkpoint.files.dense))} is packed and is no linear"
            raise CheckpointError(f"{checkpoint.directory}: {what}, so transformers cannot read it; use llmq.load")
        refuse_more_experts(checkpoint, model)
        experts_to_linears(model)
        checkpoint = checkpoint.for_model(model)
        linears_for_conv1d(model, checkpoint.linears)
        wanted = check_fit(model, checkpoint)
        experts = take_experts(model, checkpoint)
        for name in checkpoint.linears:
            if expert_in(f"{name}.weight") in experts:
                continue
            linear = model.get_submodule(name)
            size = linear.weight.numel() * checkpoint.schemes[name].bits // 8
            del linear.weight
            # For code that sets the weights of its submodules before they are loaded: GPT-2, Mamba.
            nothing: Any = torch.empty(0)
            nothing._is_hf_initialized = True
            linear.weight = nothing
            reserve(linear, size)
            linear._is_hf_initialized = True
        self._opened = checkpoint, wanted, experts, model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {".*"}  # packed tensors; check_fit refused any other

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Check what transformers loaded, and put in the packed linears."""
        assert self._opened is not None
        (checkpoint, wanted, experts, model._keys_to_ignore_on_load_unexpected), self._opened = self._opened, None
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise RequestError(_NOT_OFFLOADED)
        if getattr(model, "_tp_size", None) is not None:
            raise RequestError("packed weights cannot be split over devices; leave out tp_plan and distributed_config")
        of_experts = {name for name in wanted if expert_in(name) in experts}
        _check_loaded(model, checkpoint, wanted - of_experts)
        devices = return_experts(model, experts)
        placed = {f"{name}.bias" for name in checkpoint.linears}
        load_experts(model, checkpoint.model_files, of_experts - placed, devices)

        def make(name: str, weight: QuantizedWeight, bias: Tensor | None) -> nn.Module:
            linear = PackedLinear.from_codes(weight, bias)
            linear.rounds_inputs = bool(checkpoint.schemes[name].rounded_inputs)
            linear.exact = model.dtype == torch.float32  # which the caller asked for, or the files are in
            return linear

        def device_of(name: str) -> torch.device:
            return devices.get(expert_in(f"{name}.weight")) or reserved_on(model.get_submodule(name))

        replace_linears(model, checkpoint, make, device_of)
        group_experts(model)
        self.remember(checkpoint)

    @torch.no_grad()
    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that `save_pretrained` writes, and put their format into the model's configuration.

        Raises RequestError for merged linears, CheckpointError for a weight that the format cannot store.
        """
        stored, linears = self.quantization_config.stored, _packed_linears(model, self._schemes)
        assert stored is not None
        assert self._files is not None
        form = format_of(stored)
        self.quantization_config.stored = form.hf_config(*config_names(model, self._files, self._schemes))
        model.config.quantization_config = self.quantization_config
        inside = {f"{name}.{key}" for name, linear in linears.items() for key in linear.state_dict() if key != "bias"}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in inside}
        for name in stored_transposed(model) & state.keys():
            state[name] = state[name].T.contiguous()
        merge_experts(model, state)
        experts = tuple(f"{name}." for name in layouts(model))
        for name, linear in linears.items():
            # transformers does not know the names of single experts in the model, only those in the files.
            stored = self._files.before_saving(self._files.stored_linear(name)) if name.startswith(experts) else name
            tensors = form.encode(stored, _codes(name, linear), self._schemes[name])
            state.update({key: tensor.cpu() for key, tensor in tensors.items()})
        if form.METHOD == mlx.METHOD:
            model.config.quantization = self.quantization_config.stored
            state = mlx.stacked(state, model.config.model_type)
        return state, {}


def _check_loaded(model: nn.Module, checkpoint: Checkpoint, wanted: set[str]) -> None:
    """Raise CheckpointError if one of these tensors differs between the model and the files.

    A key_mapping given to from_pretrained can load a tensor under another name, which leaves its own random.
    """
    loaded = model.state_dict()
    for name in sorted(wanted):
        stored = checkpoint.files.read(name).to(loaded[name].device, loaded[name].dtype)
        if not torch.equal(stored, loaded[name]):
            raise CheckpointError(f"{checkpoint.directory}: transformers did not load {name} as it is in the files")


def _packed_linears(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, PackedLinear]:
    """Return the packed linears by name. Raises RequestError if one is merged or offloaded."""
    modules, linears = dict(model.named_modules()), {}
    for name in schemes:
        linear = modules.get(name)
        if not isinstance(linear, PackedLinear) or linear.grid.is_meta:
            what = "is offloaded" if isinstance(linear, PackedLinear) else f"has become a {type(linear).__name__}"
            raise RequestError(f"{name} {what}; to save the model, load it without merge=True and without offloading")
        linears[name] = linear
    return linears


def _codes(name: str, linear: PackedLinear) -> QuantizedWeight:
    try:
        return linear.codes()
    except RequestError as error:
        raise RequestError(f"{name} cannot be saved as it was read: {error}.\nCopy the checkpoint instead.") from None


# Importing this module tells transformers the name of the method, and does nothing else.
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LlmqConfig)
    register_quantizer(METHOD)(LlmqQuantizer)
