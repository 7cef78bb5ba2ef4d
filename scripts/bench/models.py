"""Make models of LLaMA's shape with random weights, packed and dense, without quantizing anything first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.plan import Decoder

CONTEXT = 4096
_WORDS_PER_LINE = 100


def config_of(sizes: Decoder, layers: int | None = None) -> Any:
    """Return the configuration of a LLaMA that never ends a text by itself."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers or sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


@torch.no_grad()
def filled(model: Any, where: torch.device) -> Any:
    """Fill a LLaMA on the meta device with random weights, on `where`. Each layer about keeps the size of its input."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model.to_empty(device=where)
    generator = torch.Generator(where).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            std = parameter.shape[1] ** -0.5 if "proj" in name else 0.02
            parameter.normal_(0, std, generator=generator)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(where)
    return model.eval().requires_grad_(False)


def dense(sizes: Decoder, dtype: torch.dtype, where: torch.device, layers: int | None = None) -> Any:
    """Return a dense LLaMA."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config_of(sizes, layers))
    return filled(model.to(dtype), where)


def write_packed(path: Path, sizes: Decoder, group: int, dtype: torch.dtype, where: torch.device) -> None:
    """Write a packed 4-bit checkpoint with random codes."""
    from transformers import LlamaForCausalLM

    from llmq.formats import compressed_tensors
    from llmq.formats.scheme import Scheme

    config, scheme = config_of(sizes), Scheme(4, group, True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator, tensors, schemes = torch.Generator(where).manual_seed(0), dict[str, Tensor](), dict[str, Scheme]()
    for name, shape in shapes.items():
        if "proj" in name:
            base, (rows, columns) = name.removesuffix(".weight"), shape
            words = (rows, columns // 8)
            tensors[f"{base}.weight_packed"] = torch.randint(
                -(2**31), 2**31, words, dtype=torch.int32, device=where, generator=generator
            )
            tensors[f"{base}.weight_scale"] = torch.full((rows, columns // group), 0.2 / columns**0.5, dtype=dtype)
            tensors[f"{base}.weight_shape"] = torch.tensor([rows, columns])
            schemes[base] = scheme
        elif "norm" in name:
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            tensors[name] = (0.02 * torch.randn(shape, device=where, generator=generator)).to(dtype)
    path.mkdir(parents=True)
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    stored = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    stored["quantization_config"] = compressed_tensors.hf_config(schemes, ["lm_head"])
    (path / "config.json").write_text(json.dumps(stored), encoding="utf-8")


def write_dense(path: Path, sizes: Decoder, layers: int, dtype: torch.dtype, where: torch.device) -> None:
    """Write a dense model of some layers, with a tokenizer that has one token for each word `wN`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    dense(sizes, dtype, where, layers).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(sizes.vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def write_text(path: Path, sizes: Decoder, words: int) -> None:
    """Write a text of random words for that tokenizer."""
    numbers = torch.randint(1, sizes.vocabulary, (words,), generator=torch.Generator().manual_seed(0)).tolist()
    lines = (numbers[i : i + _WORDS_PER_LINE] for i in range(0, words, _WORDS_PER_LINE))
    path.write_text("\n".join(" ".join(f"w{number}" for number in line) for line in lines), encoding="utf-8")
