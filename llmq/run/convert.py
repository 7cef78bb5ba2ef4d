"""Converts a packed checkpoint to another format. Codes, scales and zero points stay the same."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
from tqdm import tqdm
from tyro.conf import Positional

from llmq.checkpoint.digests import digests_of
from llmq.checkpoint.gguf_writer import GgufSettings
from llmq.checkpoint.model_files import companions_in
from llmq.checkpoint.module_matching import is_harmless
from llmq.checkpoint.output_dir import check_output
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import Writer
from llmq.core.config import VERSION
from llmq.core.errors import RequestError
from llmq.core.settings import TOKEN, one_of
from llmq.formats import CONVERTED, ROUNDING, gguf, gptq, method_of
from llmq.formats.scheme import Scheme
from llmq.models.gguf_converter import FLOATS
from llmq.models.locate import gguf_in
from llmq.models.model_source import build_skeleton
from llmq.models.packable import config_names
from llmq.models.stock_loading import unreadable
from llmq.models.stored_names import has_no_place
from llmq.run.gguf_export import model_name, write_gguf
from llmq.runtime.model_config import model_config
from llmq.verification.check import DIGESTS, check


@dataclass(frozen=True)
class ConvertConfig:
    """Write a packed checkpoint in another format. Nothing is rounded. What the format cannot store is refused."""

    directory: Annotated[Path, Positional]
    """The checkpoint: compressed-tensors, gptq, awq, auto-round, mlx or a .gguf file."""
    output: Path
    """Directory for the result. Must be new or empty unless --overwrite is given."""
    format: str
    """compressed-tensors, int-quantized (symmetric 4 and 8 bit beside 8-bit inputs), gptq, awq (4 bit), mlx (symmetric,
    groups of 32, 64, 128) or gguf (llama.cpp; symmetric 2, 4 and 8 bit; asymmetric 4 bit where scale * zero is a
    float16 number)."""
    gguf_floats: str = "auto"
    """How embeddings and other tensors that are not packed are stored in a .gguf file: auto (as they are), f32, f16,
    bf16 or q8_0 (8 bit, rounded to nearest)."""
    activations: int = 16
    """8: say that what enters the layers is rounded to 8 bits, token by token if the checkpoint has no scales for it,
    so that engines run W8A8 or W4A8. For compressed-tensors and int-quantized. llmq.eval --activations 8 shows what it
    costs. 16: as the checkpoint says."""
    overwrite: bool = False
    """Replace a checkpoint that is already in the output directory."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the checkpoint. Only for sources you trust."""

    def __post_init__(self) -> None:
        one_of("format", self.format, (*CONVERTED, gguf.METHOD))
        one_of("gguf floats", self.gguf_floats, FLOATS)
        if self.activations not in (8, 16):
            raise RequestError(f"activations must be 8 or 16 bits; got {self.activations}")
        if self.output.suffix == ".gguf":
            raise RequestError(f"output {self.output} must be a directory; the file in it is named after the model")


@torch.no_grad()
def convert(config: ConvertConfig, progress: bool = False, tell: Callable[[str], object] = lambda _: None) -> Path:
    """Convert a checkpoint; return the directory of the result, or the .gguf file.

    `tell` is called with what the user should know.

    Raises RequestError if the output directory cannot be used. Raises CheckpointError if the checkpoint is damaged, or
    holds something that the format cannot store. In both cases no checkpoint is left in the output directory.
    """
    check_output(config.output, config.overwrite)
    if config.directory.resolve() == config.output.resolve():
        raise RequestError("the output directory is the checkpoint's own; choose another")
    checkpoint = Checkpoint(config.directory)
    before = str(checkpoint.quantization.get("checkpoint_format") or method_of(checkpoint.quantization))
    schemes = _schemes(checkpoint)
    if config.activations == 8:
        schemes = {name: replace(s, rounded_inputs=s.rounded_inputs or TOKEN) for name, s in schemes.items()}
    if config.format not in ROUNDING and any(scheme.rounded_inputs for scheme in schemes.values()):
        raise RequestError(f"{config.format} cannot say that inputs are rounded to 8 bits; use {' or '.join(ROUNDING)}")
    if config.format == gguf.METHOD:
        return _to_gguf(config, schemes, before, progress, tell)
    target = CONVERTED[config.format]
    model = build_skeleton(model_config(checkpoint, config.trust_remote_code), config.trust_remote_code)
    view = checkpoint.for_model(model)
    state = model.state_dict()
    in_model = [name for name in view.other_names if not is_harmless(view, model, name)]
    carried = [name for name in in_model if name not in state and has_no_place(model, name)]
    kept = sorted({stored for name in in_model for stored in view.model_files.stored_names(name)})
    schemes_in_model = {name: schemes[view.stored_linear(name)] for name in view.linears}
    symmetry = {name: scheme.symmetric for name, scheme in schemes_in_model.items()}
    if config.format in ROUNDING and (fault := unreadable(model, view.model_files, symmetry.get)):
        raise RequestError(fault)
    quantization = target.hf_config(*config_names(model, view.model_files, schemes_in_model, carried))
    if target is gptq and not all(scheme.symmetric for scheme in schemes.values()):
        tell(f"note: {gptq.ASYMMETRIC_NOTE}")
    computed = {name: value for name, value in digests_of(checkpoint).items() if name in schemes or name in kept}
    with Writer(config.output, config.overwrite) as writer:
        for _, names in groupby(kept, key=lambda name: name.rpartition(".")[0]):
            writer.put({name: checkpoint.files.read(name) for name in names})
        for name in tqdm(checkpoint.linears, "layers", disable=not progress, unit="layer"):
            writer.put(target.encode(name, checkpoint.weight(name), schemes[name]))
        writer.finish(
            companions_in(config.directory) if checkpoint.gguf is None else checkpoint.gguf.companions,
            None,
            quantization,
            lambda: {"llmq": VERSION, "converted_from": before, DIGESTS: computed},
            lambda directory: check(directory, computed, config.trust_remote_code),
        )
    return config.output


def _to_gguf(
    config: ConvertConfig, schemes: dict[str, Scheme], before: str, progress: bool, tell: Callable[[str], object]
) -> Path:
    """Convert a checkpoint to a .gguf file; return its path."""
    if gguf_in(config.directory) is not None:
        raise RequestError(f"{config.directory} is a .gguf file already")
    name, written = model_name(config.directory), list[Path]()
    settings = GgufSettings(name, config.gguf_floats, config.trust_remote_code, progress)

    def write(target: Path) -> dict[str, Any]:
        made, said = write_gguf(config.directory, target, schemes, settings)
        for note in said["notes"]:
            tell(f"note: {note}")
        written.append(config.output / made.path.name)
        return {"llmq": VERSION, "converted_from": before} | said

    with Writer(config.output, config.overwrite) as writer:
        writer.finish_gguf(write)
    return written[0]


def _schemes(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Return the scheme of each linear, without what only the source's format or writer claims."""
    # Some tools call every AWQ checkpoint asymmetric. If all zero points are in the middle, symmetric loses nothing.
    symmetric = all(scheme.symmetric for scheme in checkpoint.schemes.values()) or all(
        checkpoint.weight(name).symmetric for name in checkpoint.linears
    )
    return {
        name: replace(
            scheme,
            symmetric=symmetric or scheme.symmetric,
            act_order=scheme.act_order and checkpoint.weight(name).group_of is not None,
            zero_offset=0,
        )
        for name, scheme in checkpoint.schemes.items()
    }
