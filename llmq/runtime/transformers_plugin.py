"""llmq as a quantization method of transformers: it opens what `llmq.load` opens, and saves what either has opened.

    config = AutoConfig.from_pretrained(DIR)
    config.quantization_config = {"quant_method": "llmq"}
    model = AutoModelForCausalLM.from_pretrained(DIR, config=config)

is the model of `llmq.load(DIR)`, for every format llmq reads, with no other quantization package. Without the second
line transformers asks for the package of the format that config.json names. (Weights under an old name, such as
gptq_model-4bit-128g.safetensors, it finds if `config.transformers_weights` says that name.)

`save_pretrained` of such a model, or of one from `llmq.load`, writes the packed tensors as they were read, under a
config.json of their own format; never `llmq`, which nobody else could read. AutoRound's checkpoints become plain gptq
or awq. GPTQ zero points are written as llmq does: v1 for symmetric weights, v2 for others. Missing is what transformers
has no place for: quantize_config.json, in whose absence readers of GPTQ checkpoints look into config.json.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.module_matching import check_fit, replace_linears
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, RequestError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import format_of
from llmq.formats.scheme import Scheme
from llmq.models.block_structure import left_in_float
from llmq.runtime.packed_linear import PackedLinear

METHOD = "llmq"
_PLACE = "llmq_place"
_NOT_OFFLOADED = "packed weights are not offloaded; choose a device_map without disk, and without cpu beside GPUs"


def attach(model: Any, checkpoint: Checkpoint) -> None:
    """Let `save_pretrained` of a model write the format that it was loaded from."""
    quantizer = LlmqQuantizer(LlmqConfig())
    quantizer.remember(checkpoint)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config


class LlmqConfig(QuantizationConfigMixin):
    """Asks for this method; of a loaded model, the quantization_config of its format.

    Whatever else a request says is not looked at: the directory knows how its tensors are packed.
    """

    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.stored: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return {"quant_method": METHOD} if self.stored is None else copy.deepcopy(self.stored)


class LlmqQuantizer(HfQuantizer):
    """What transformers calls while it opens and saves a model."""

    requires_calibration = True  # transformers' way to say: for packed checkpoints only

    def __init__(self, quantization_config: LlmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: LlmqConfig
        self._schemes: dict[str, Scheme] = {}
        # While a model is being opened: its files, the tensors it takes from them, and a setting to put back.
        self._opened: tuple[Checkpoint, set[str], Any] | None = None

    def remember(self, checkpoint: Checkpoint) -> None:
        """Keep what saving needs beside the model itself."""
        self._schemes, self.quantization_config.stored = checkpoint.schemes, checkpoint.quantization

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise RequestError for what has no room on the devices themselves. "auto" is seen through later."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise RequestError(_NOT_OFFLOADED)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # packed weights never change, but gradients flow through them to adapters

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Leave of packed linears their biases, so that transformers fills in the rest.

        Raises CheckpointError unless the files hold exactly that: transformers would go on with random weights.
        """
        if not checkpoint_files:
            raise RequestError("llmq opens packed checkpoints from files; from_pretrained was given a state_dict only")
        checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
        wanted = check_fit(model, checkpoint)
        for name in checkpoint.linears:
            linear = model.get_submodule(name)
            size = linear.weight.numel() * checkpoint.schemes[name].bits // 8
            linear.weight = None
            # As large as what will be here, so that device_map="auto" counts right; and it ends up on the right device.
            linear.register_buffer(_PLACE, torch.empty(size, dtype=torch.uint8, device="meta"), persistent=False)
            linear._is_hf_initialized = True
        self._opened = checkpoint, wanted, model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {".*"}  # packed tensors; any other would have been refused above

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:  # noqa: ARG002
        assert self._opened is not None
        (checkpoint, wanted, model._keys_to_ignore_on_load_unexpected), self._opened = self._opened, None
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise RequestError(_NOT_OFFLOADED)
        if getattr(model, "_tp_size", None) is not None:
            raise RequestError("packed weights are not split over devices; leave out tp_plan and distributed_config")

        _check_loaded(model, checkpoint, wanted)

        def make(name: str, weight: QuantizedWeight, bias: Tensor | None) -> nn.Module:
            return PackedLinear.from_codes(weight, bias).to(model.get_submodule(name).get_buffer(_PLACE).device)

        replace_linears(model, checkpoint, make)
        self.remember(checkpoint)

    @torch.no_grad()
    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that `save_pretrained` writes; the model's configuration then says their format.

        Raises RequestError for merged linears, CheckpointError for what the format cannot say.
        """
        stored, linears = self.quantization_config.stored, _packed_linears(model, self._schemes)
        assert stored is not None
        form = format_of(stored)
        self.quantization_config.stored = form.hf_config(self._schemes, left_in_float(model, self._schemes))
        model.config.quantization_config = self.quantization_config
        inside = {
            f"{name}.{part}" for name, linear in linears.items() for part in linear.state_dict() if part != "bias"
        }
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in inside}
        for name, linear in linears.items():
            tensors = form.encode(name, _codes(name, linear), self._schemes[name])
            state.update({part: tensor.cpu() for part, tensor in tensors.items()})
        return state, {}


def _check_loaded(model: nn.Module, checkpoint: Checkpoint, wanted: set[str]) -> None:
    """Raise CheckpointError unless the model holds these tensors of the files.

    from_pretrained can be told otherwise: a key_mapping may put one in the place of another, and leave that random.
    """
    loaded = model.state_dict()
    for name in sorted(wanted):
        stored = checkpoint.files.read(name).to(loaded[name].device, loaded[name].dtype)
        if not torch.equal(stored, loaded[name]):
            raise CheckpointError(f"{checkpoint.directory}: transformers did not load {name} as it is in the files")


def _packed_linears(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, PackedLinear]:
    modules, found = dict(model.named_modules()), {}
    for name in schemes:
        linear = modules.get(name)
        if not isinstance(linear, PackedLinear) or linear.grid.is_meta:
            what = "is offloaded" if isinstance(linear, PackedLinear) else f"has become a {type(linear).__name__}"
            raise RequestError(f"{name} {what}: to save the model, load it again without merge=True and offloading")
        found[name] = linear
    return found


def _codes(name: str, linear: PackedLinear) -> QuantizedWeight:
    try:
        return linear.codes()
    except RequestError as error:
        raise RequestError(f"{name} cannot be saved as it was read: {error}") from None


# The one thing here that importing does: transformers learns the method's name.
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LlmqConfig)
    register_quantizer(METHOD)(LlmqQuantizer)
