"""Write a Llama-shaped model with random weights: as large as a real one, where speed or memory are to be measured.

Activations stay of ordinary size through all blocks, for a unit input gives a unit output:

    w [out, in] = normal / sqrt(in)        norms = 1 + 0.1 * normal

Every tensor has a random stream of its own, so the size of shards and the number of threads change no number. Only one
shard is in memory at a time, and config.json comes last.

    python scripts/make_model.py --shape 7b --output model-7b
    python -m llmq.quantize --model model-7b --method rtn --output model-7b-4bit
"""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmq.cli import run
from llmq.core.errors import RequestError, WorkError
from llmq.models.safetensors_files import INDEX

_NAMES = ("hidden", "intermediate", "blocks", "heads", "kv_heads", "vocabulary")
_SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),  # Llama 2 7B
    "1b": (2048, 5632, 22, 32, 4, 32000),  # TinyLlama 1.1B
    "tiny": (128, 256, 2, 4, 2, 384),
}
_AT_ONCE = 1 << 22  # random numbers in float32 before they are rounded to the model's dtype


@dataclass(frozen=True)
class MakeConfig:
    """Write a Llama-shaped model with random weights and a tokenizer of one token per byte."""

    output: Path
    """Where to write; new or empty."""
    shape: Literal["7b", "1b", "tiny"] = "7b"
    """Of Llama 2 7B (13.5 GB), TinyLlama 1.1B (2.2 GB) or a model for tests (1 MB), but for the numbers given below."""
    hidden: int | None = None
    """Width of the residual stream; a multiple of twice the heads."""
    intermediate: int | None = None
    """Width inside the MLP."""
    blocks: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    """A divisor of heads; fewer is grouped-query attention."""
    vocabulary: int | None = None
    """Rows of the embedding and of lm_head, which are not tied; the tokenizer uses the first 258."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    shard_gb: float = 0.5
    """Most 10^9 bytes per file; one file is in memory at a time."""
    seed: int = 0
    """Of all weights, 0 to 65535; the same seed gives the same bytes."""


def make_model(config: MakeConfig) -> None:
    """Write tokenizer, shards, index and config.json, in that order. Raises RequestError before anything is written."""
    with torch.device("meta"):
        model = LlamaForCausalLM(_llama(config)).to(getattr(torch, config.dtype))
    state, output = model.state_dict(), config.output
    plan = split_torch_state_dict_into_shards(state, max_shard_size=round(config.shard_gb * 1e9))
    total = sum(tensor.nbytes for tensor in state.values())
    _check_room(output, total)
    print(f"{output}: {total / 1e9:.3g} GB in {len(plan.filename_to_tensors)} files", file=sys.stderr)
    # torch uses the lower 32 bits of a seed, and draws on one core: the cores share out the tensors.
    seeds = {name: (config.seed << 16) + i for i, name in enumerate(state)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        byte_tokenizer().save_pretrained(output)
        with tqdm(total=total, unit="B", unit_scale=True) as bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for file, names in plan.filename_to_tensors.items():
                made = dict(zip(names, pool.map(lambda n: random_like(state[n], seeds[n]), names), strict=True))
                save_file(made, output / file, metadata={"format": "pt"})
                bar.update(sum(tensor.nbytes for tensor in made.values()))
                del made  # or two shards would be in memory
        if plan.is_sharded:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
            (output / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        model.config.save_pretrained(output)
    except BaseException as error:
        for path in output.glob("*"):  # all ours: the directory was empty
            path.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise WorkError(f"cannot write to {output}: {error}") from None
        raise


def random_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Weights of the shape and dtype of `tensor`: [out, in] of std 1 / sqrt(in), or those of a norm, near 1."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (1.0, 0.1) if tensor.ndim == 1 else (0.0, tensor.shape[1] ** -0.5)
    weight = torch.empty_like(tensor, device="cpu")
    for part in weight.view(-1).split(_AT_ONCE):
        part.copy_(torch.randn(part.shape, generator=generator).mul_(std).add_(mean))
    return weight


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: any text becomes ids below 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _llama(config: MakeConfig) -> LlamaConfig:
    """Raises RequestError for a shape that no Llama has."""
    numbers = dict(zip(_NAMES, _SHAPES[config.shape], strict=True))
    numbers |= {name: value for name in _NAMES if (value := getattr(config, name)) is not None}
    hidden, intermediate, blocks, heads, kv_heads, vocabulary = numbers.values()
    for rule, holds in {
        "every number must be positive": min(*numbers.values(), config.shard_gb) > 0,
        "hidden must be a multiple of 2 x heads": hidden % max(2 * heads, 1) == 0,
        "heads must be a multiple of kv-heads": heads % max(kv_heads, 1) == 0,
        "vocabulary must be at least 258, the tokenizer's": vocabulary >= 258,
        "seed must be between 0 and 65535": 0 <= config.seed < 1 << 16,
    }.items():
        if not holds:
            got = ", ".join(f"{name} {value}" for name, value in numbers.items())
            raise RequestError(f"{rule}; got {got}, shard-gb {config.shard_gb}, seed {config.seed}")
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": vocabulary}
    sizes |= {"num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    about = {"architectures": ["LlamaForCausalLM"], "dtype": config.dtype, "tie_word_embeddings": False}
    return LlamaConfig(**sizes, **tokens, **about, max_position_embeddings=4096)


def _check_room(output: Path, size: int) -> None:
    """Raises RequestError for an output that is not empty, or a disk that is too full."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"output {output} is not an empty directory; choose another, or remove it first")
    free = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists())).free
    if size * 1.01 > free:
        need = f"{output} would take {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left"
        raise RequestError(f"{need}; choose a smaller --shape or another disk")


if __name__ == "__main__":
    run(MakeConfig, make_model)
