"""Write a model with the shape of a known one and random weights, to measure speed and memory at real size.

Each layer keeps the size of its input, so activations stay of ordinary size through all blocks:

    w [out, in] = normal / sqrt(in)        norms and the biases of routers = 1 + 0.1 * normal

Every tensor has its own random stream. So the shard size and the number of threads do not change the weights. Only one
shard is in memory at a time. config.json is written last. Every expert of a mixture has tensors of its own on disk, as
in the files that transformers writes.

    python scripts/make_model.py --shape 7b --output model-7b
    python -m llmq.quantize --model model-7b --method rtn --output model-7b-4bit
    python scripts/make_model.py --shape qwen3-30b-a3b --blocks 1 --output one-block
    python scripts/make_model.py --shape deepseek-v3 --shard-gb 5 --hollow --output hollow
    python -m llmq.quantize --model hollow --dry-run
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmq.cli import run
from llmq.core.errors import RequestError, WorkError
from llmq.models.safetensors_files import INDEX

_NAMES = ("hidden", "intermediate", "blocks", "heads", "kv_heads", "vocabulary", "experts")
_SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000, 0),  # Llama 2 7B
    "1b": (2048, 5632, 22, 32, 4, 32000, 0),  # TinyLlama 1.1B
    "tiny": (128, 256, 2, 4, 2, 384, 0),
    "qwen3-30b-a3b": (2048, 768, 48, 32, 4, 151936, 128),
    "deepseek-v3": (7168, 2048, 61, 128, 128, 129280, 256),
}
_TOP = 8  # experts of a token, in both mixtures
# What the numbers above do not say of an architecture: (model_type, fields of its config).
_LLAMA = ("llama", {"max_position_embeddings": 4096})
_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": ("qwen3_moe", {"head_dim": 128, "norm_topk_prob": True}),
    "deepseek-v3": (
        "deepseek_v3",
        {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        | {"n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "norm_topk_prob": True},
    ),
}
_AT_ONCE = 1 << 22  # random numbers drawn in float32 before they are rounded to the model's dtype


@dataclass(frozen=True)
class MakeConfig:
    """Write a model with the shape of a known one, random weights, and a tokenizer with one token per byte."""

    output: Path
    """Directory to write to; it must be new or empty."""
    shape: Literal["7b", "1b", "tiny", "qwen3-30b-a3b", "deepseek-v3"] = "7b"
    """Llama 2 7B (13.5 GB), TinyLlama 1.1B (2.2 GB), a Llama for tests (1 MB), or a mixture of experts: Qwen3 30B-A3B
    (61 GB, with --blocks 1 2.5 GB), DeepSeek-V3 (1342 GB). The flags below change its numbers."""
    hidden: int | None = None
    """Width of the residual stream; a multiple of 2 x heads."""
    intermediate: int | None = None
    """Width inside the MLP; of a mixture: inside an expert."""
    blocks: int | None = None
    """Number of decoder blocks. The first 3 of deepseek-v3 have no experts."""
    heads: int | None = None
    """Number of attention heads."""
    kv_heads: int | None = None
    """Number of key and value heads; heads must be a multiple of it. Fewer than heads: grouped-query attention."""
    vocabulary: int | None = None
    """Rows of the embedding and of lm_head, which are not tied. The tokenizer uses the first 258."""
    experts: int | None = None
    """Number of experts of a mixture; a multiple of 8, at least 16."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of all weights."""
    shard_gb: float = 0.5
    """Largest size of a file in units of 10^9 bytes; one file is in memory at a time."""
    seed: int = 0
    """Seed of all weights, 0 to 65535; the same seed gives the same bytes."""
    hollow: bool = False
    """Write the headers of the files alone. The weights are holes, which take no room on most disks and read as zeros:
    enough for a dry run, which reads no weights."""


def make_model(config: MakeConfig) -> None:
    """Write tokenizer, shards, index and config.json, in this order.

    Raises RequestError if the request is impossible; then nothing is written.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(config)).to(getattr(torch, config.dtype))
    model.config.architectures = [type(model).__name__]
    state, output = dict(_as_stored(model.state_dict())), config.output
    plan = split_torch_state_dict_into_shards(state, max_shard_size=round(config.shard_gb * 1e9))
    total = sum(tensor.nbytes for tensor in state.values())
    _check_room(output, 0 if config.hollow else total)
    print(f"{output}: {total / 1e9:.3g} GB in {len(plan.filename_to_tensors)} files", file=sys.stderr)
    # torch uses only the lower 32 bits of a seed. It draws on one core, so each core draws other tensors.
    seeds = {name: (config.seed << 16) + i for i, name in enumerate(state)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        byte_tokenizer().save_pretrained(output)
        with tqdm(total=total, unit="B", unit_scale=True) as bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for file, names in plan.filename_to_tensors.items():
                bar.update(sum(state[name].nbytes for name in names))
                if config.hollow:
                    _save_hollow({name: state[name] for name in names}, output / file)
                    continue
                made = dict(zip(names, pool.map(lambda n: random_like(state[n], seeds[n]), names), strict=True))
                save_file(made, output / file, metadata={"format": "pt"})
                del made  # otherwise two shards would be in memory
        if plan.is_sharded:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
            (output / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        model.config.save_pretrained(output)
    except BaseException as error:
        for path in output.glob("*"):  # all files are ours, because the directory was empty
            path.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise WorkError(f"cannot write to {output}: {error}") from None
        raise


def random_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Return random weights with the shape and dtype of `tensor`.

    A matrix [out, in] has mean 0 and standard deviation 1 / sqrt(in). The weights of a norm have mean 1.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, std = (1.0, 0.1) if tensor.ndim == 1 else (0.0, tensor.shape[1] ** -0.5)
    weight = torch.empty_like(tensor, device="cpu")
    for piece in weight.view(-1).split(_AT_ONCE):
        piece.copy_(torch.randn(piece.shape, generator=generator).mul_(std).add_(mean))
    return weight


def _save_hollow(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file of these shapes: its length and its header, then nothing up to its end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends, kinds = 0, {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    for name, tensor in tensors.items():
        place = [ends, ends := ends + tensor.nbytes]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + ends)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte. All ids are below 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _as_stored(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and shape of each tensor on disk. In memory, the experts of a layer are stacked."""
    for name, tensor in state.items():
        if tensor.ndim < 3:
            yield name, tensor
            continue
        place, _, stacked = name.rpartition(".")
        linears = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else (stacked,)
        for e, expert in enumerate(tensor):
            for linear, weight in zip(linears, expert.chunk(len(linears)), strict=True):
                # A view would count with the bytes of the whole stack when shards are filled.
                yield f"{place}.{e}.{linear}.weight", torch.empty_like(weight)


def _config(config: MakeConfig) -> Any:
    """Return the config of the model. Raises RequestError if no model can have this shape."""
    numbers = dict(zip(_NAMES, _SHAPES[config.shape], strict=True))
    numbers |= {name: value for name in _NAMES if (value := getattr(config, name)) is not None}
    hidden, intermediate, blocks, heads, kv_heads, vocabulary, experts = numbers.values()
    is_mixture = config.shape in _MIXTURES
    for rule, holds in {
        "every number must be positive": min(*list(numbers.values())[:-1], config.shard_gb) > 0,
        "hidden must be a multiple of 2 x heads": hidden % max(2 * heads, 1) == 0,
        "heads must be a multiple of kv-heads": heads % max(kv_heads, 1) == 0,
        "deepseek-v3 must have as many kv-heads as heads": config.shape != "deepseek-v3" or heads == kv_heads,
        "experts must be a multiple of 8, at least 16": not is_mixture or (experts >= 16 and experts % 8 == 0),
        "a Llama has no experts": is_mixture or experts == 0,
        "vocabulary must be at least 258, because the tokenizer has 258 tokens": vocabulary >= 258,
        "seed must be between 0 and 65535": 0 <= config.seed < 1 << 16,
    }.items():
        if not holds:
            got = ", ".join(f"{name} {value}" for name, value in numbers.items())
            raise RequestError(f"{rule}; got {got}, shard-gb {config.shard_gb}, seed {config.seed}")
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": vocabulary}
    sizes |= {"num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model_type, fields = _MIXTURES.get(config.shape, _LLAMA)
    if is_mixture:
        sizes |= {"num_local_experts" if model_type == "deepseek_v3" else "num_experts": experts}
        # In both mixtures a dense MLP is as wide as all experts of a token together.
        width = intermediate * (_TOP + fields.get("n_shared_experts", 0))
        sizes |= {"moe_intermediate_size": intermediate, "intermediate_size": width, "num_experts_per_tok": _TOP}
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}
    return AutoConfig.for_model(model_type, **sizes, **fields, **tokens, dtype=config.dtype)


def _check_room(output: Path, size: int) -> None:
    """Raise RequestError if the output directory is not empty, or if the disk is too full."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"output {output} is not an empty directory; choose another one, or remove it first")
    free = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists())).free
    if size * 1.01 > free:
        need = f"{output} needs {size / 1e9:.2f} GB, but the disk has only {free / 1e9:.2f} GB left"
        raise RequestError(f"{need}; choose a smaller --shape or another disk")


if __name__ == "__main__":
    run(MakeConfig, make_model)
