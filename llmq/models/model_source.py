"""The model to quantize: a skeleton on the meta device, and tensors that are read block by block."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llmq.core.errors import CheckpointError, RequestError, WorkError, first_line
from llmq.models.conv1d import linears_for_conv1d
from llmq.models.decoder_blocks import find_blocks, refuse_without_linears, shared_by_blocks
from llmq.models.experts import experts_to_linears
from llmq.models.gguf_config import complete_config
from llmq.models.gguf_file import GgufFile, open_gguf, parsed_once
from llmq.models.gguf_header import read_header
from llmq.models.locate import locate
from llmq.models.model_class import model_class
from llmq.models.model_files import ModelFiles, by_conversion
from llmq.models.safetensors_files import SafetensorsDirectory, TensorFiles
from llmq.models.source_checks import (
    carried_names,
    refuse_float8,
    refuse_missing,
    refuse_quantized,
    without_rescaling,
)
from llmq.models.stored_names import tied_names, untie_own
from llmq.models.untrusted_files import read_json

_GENERATION = "generation_config.json"


class ModelSource:
    """A causal language model. Its weights stay on disk until a block asks for them. `spec`: see `locate`.

    Raises RequestError for what llmq does not quantize (pickle weights, quantized weights, models without one list of
    decoder blocks), CheckpointError for missing or corrupt files.
    """

    def __init__(self, spec: str, trust_remote_code: bool = False) -> None:
        path = locate(spec, trust_remote_code)
        self.is_gguf = path.is_file()
        if self.is_gguf:
            read_header(path)  # damage is found here; the package gguf would take it for what the file says
        self.directory = path.parent if self.is_gguf else path
        self._hf_arguments = {"trust_remote_code": trust_remote_code, "gguf_file": path.name if self.is_gguf else None}
        with parsed_once() if self.is_gguf else nullcontext():
            self.config = self._read_config()
            reader = open_gguf(path) if self.is_gguf else None
            if reader is not None:
                with suppress(Exception):  # whatever it is, it comes again when somebody asks for the tokenizer
                    _ = self.tokenizer
        self.config_changes = without_rescaling(self.config)
        """What config.json of the result says otherwise."""
        if reader is not None:
            try:
                complete_config(self.config, reader)
            except Exception as error:  # anything may stand in a header
                raise CheckpointError(f"{path}: its header describes no model ({first_line(error)})") from None
        refuse_quantized(self.config, path)
        self.skeleton = build_skeleton(self.config, trust_remote_code)
        files: TensorFiles = GgufFile(path, reader, self.skeleton) if reader else SafetensorsDirectory(path)
        self.files = ModelFiles(files, self.skeleton, renamed=not reader)
        """The tensors under the names that they have in the model."""
        self.is_untied = untie_own(self.skeleton, self.files)
        """Whether config.json ties tensors that the files hold apart. The files count."""
        if self.is_untied:
            self.skeleton = build_skeleton(self.config, trust_remote_code)
        self.block_names = find_blocks(self.skeleton)
        refuse_without_linears(self.blocks)
        refuse_missing(self.tensor_names, self.files, path)
        refuse_float8(self.tensor_names, self.files, path)
        self.carried_names = carried_names(self.skeleton, self.files, path)
        """The names of tensors without a place in the model. They are copied as they are."""
        self.shared_names = shared_by_blocks(self.skeleton, self.block_names)
        """The names of tensors that belong to several blocks."""

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the decoder blocks of the skeleton, in order."""
        return [self.skeleton.get_submodule(name) for name in self.block_names]

    @cached_property
    def size(self) -> int:
        """Count the numbers in the model, each stored once."""
        state = self.skeleton.state_dict()
        return sum(state[name].numel() for name in self.tensor_names)

    @cached_property
    def tensor_names(self) -> list[str]:
        """Return the name of every tensor of the model, without aliases of tied weights."""
        return [name for name in self.skeleton.state_dict() if name not in self._tied]

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Return the name of the tensor that each alias repeats."""
        return tied_names(self.skeleton)

    @cached_property
    def all_names(self) -> list[str]:
        """Return the name of every tensor, also of those that repeat another one. `read` knows them, too."""
        return list(self.skeleton.state_dict())

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which the linears are stored. The quantized checkpoint keeps it."""
        within = ((name, self.skeleton.get_submodule(name).named_modules()) for name in self.block_names)
        linears = (f"{name}.{inner}" for name, inside in within for inner, m in inside if isinstance(m, nn.Linear))
        return self.files.dtype(f"{next(linears)}.weight")

    @cached_property
    def tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self.directory, **self._hf_arguments)
        except Exception as error:  # a dozen tokenizer classes, each with its own way to fail
            raise CheckpointError(f"{self.directory} has no tokenizer that opens: {first_line(error)}") from None

    def outer_names(self) -> list[str]:
        """Return the names of tensors outside the decoder blocks: embeddings, final norm, lm_head."""
        prefixes = tuple(name + "." for name in self.block_names)
        return [name for name in self.tensor_names if not name.startswith(prefixes)]

    def block_tensor_names(self, block: str, aliases: bool = False) -> list[str]:
        """Return the names of the tensors of a block. `aliases`: also of those that another block has, too."""
        return [n for n in (self.all_names if aliases else self.tensor_names) if n.startswith(block + ".")]

    def read(self, name: str) -> Tensor:
        """Return one tensor of the model in its stored dtype, on the CPU. Raises WorkError if it is not finite."""
        return _finite(name, self.files.read(self._tied.get(name, name)))

    def as_stored(self, names: Iterable[str], instead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return these tensors of the model as the files hold them, under the names there.

        `instead`: new values by name. What is made of the same stored tensors as one of them, or as a tensor that is
        not asked for, comes under the model's names.
        """
        tensors, instead = dict[str, Tensor](), instead or {}
        for together in by_conversion(self.files, names):
            stored = self.files.stored_names(together[0])
            is_whole = set(self.files.made_with(together[0])) == set(together)
            if is_whole and instead.keys().isdisjoint(together):
                tensors |= {name: _finite(name, self.files.stored.read(name)) for name in stored}
            else:
                for name in together:
                    new = instead[name] if name in instead else self.read(name)
                    place = stored[0] if self.files.is_renamed(name) else name
                    tensors[place] = self.files.turned(name, new).to(self.files.dtype(name))
        return tensors

    def load(self, names: list[str], device: torch.device, dtype: torch.dtype) -> None:
        """Put these tensors into the skeleton, floats cast to `dtype`."""
        tensors = dict[str, Tensor]()
        for name in sorted(names, key=lambda name: self.files.stored_names(self._tied.get(name, name))[0]):
            if (owner := self._tied.get(name, name)) in tensors:
                tensors[name] = tensors[owner]
                continue
            tensor = self.read(name)
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        self.files.forget()
        self._assign(tensors)

    def free(self, names: list[str]) -> None:
        """Send these tensors of the skeleton back to the meta device."""
        parameters = self.skeleton.state_dict()
        self._assign({name: torch.empty_like(parameters[name], device="meta") for name in names})

    def load_all(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return the whole model in memory, ready to run. A quantized one is compared with it."""
        self.load(self.tensor_names, device, dtype)
        self.skeleton.tie_weights()
        read_generation_config(self.skeleton, self.directory)
        return move_buffers(self.skeleton, device).eval()

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        try:
            self.skeleton.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"the weights do not fit the model that config.json describes: {reason}") from None

    def _read_config(self) -> Any:
        try:
            return AutoConfig.from_pretrained(self.directory, **self._hf_arguments)
        except Exception as error:  # config classes check their own fields and raise what they like
            code = "it needs its own modelling code; pass --trust-remote-code if you trust its author"
            reason = code if "trust_remote_code" in str(error) else first_line(error)
            raise RequestError(f"{self.directory} cannot be opened as a language model: {reason}") from None


def build_skeleton(config: Any, trust_remote_code: bool = False) -> Any:
    """Return a model with parameters on the meta device and real buffers (rotary frequencies are computed)."""
    try:
        with init_empty_weights(include_buffers=False), _StacksOnMeta():
            # float32: buffers are real, and must not be rounded to the dtype of the weights (Gemma's embedding scale).
            auto = model_class(config)
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise RequestError(f"not a causal language model: {first_line(error)}") from None
    except Exception as error:  # what modelling code does with a config it cannot build, any architecture its own way
        what = f"{type(error).__name__}: {first_line(error)}"
        raise RequestError(f"config.json describes no {config.model_type} model that can be built ({what})") from None
    linears_for_conv1d(model)
    experts_to_linears(model)
    return model.requires_grad_(False).eval()


class _StacksOnMeta(TorchFunctionMode):
    """Make empty tensors of three dimensions on the meta device at once.

    Other parameters go there one by one after they were made. The experts of a block may be too large to be made.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}) | {"device": "meta"}) if func in (torch.empty, torch.zeros) else None
        return made if made is not None and made.ndim > 2 else func(*args, **(kwargs or {}))


def read_generation_config(model: Any, directory: Path) -> None:
    """Give the model the end tokens and sampling defaults that its directory holds, if it holds any."""
    if (directory / _GENERATION).exists():
        read_json(directory, _GENERATION)
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except Exception as error:  # it checks its own fields and raises what it likes
            raise CheckpointError(f"{directory / _GENERATION} cannot be used: {first_line(error)}") from None


def move_buffers(model: Any, device: torch.device) -> Any:
    """Move the buffers of a skeleton, which are real from the start, to where its weights are."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    return model


def _finite(name: str, tensor: Tensor) -> Tensor:
    # NaN is both least and largest; checking each number is 30 times slower.
    is_number = tensor.is_floating_point() and tensor.numel() > 0
    if is_number and not all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax()):
        raise WorkError(f"tensor {name} holds NaN or infinite values; this model cannot be quantized")
    return tensor
