"""Tiny random models of real architectures, and a tokenizer: tests run the real loading code in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

# name -> (model_type, what differs from _SHAPE)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "gpt2": ("gpt2", {"pad_token_id": None}),  # Conv1D instead of linears
    "arcee": ("arcee", {}),  # an MLP without a gate: down(act(up(x)))
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model of that architecture."""
    model_type, differences = ARCHITECTURES[name]
    return AutoConfig.for_model(model_type, **(_SHAPE | differences | changes))


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32. Norm weights are random too, or a mistake in folding them would not show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "embed" not in parameter_name:
                parameter *= 4  # the default 0.02 makes blocks near identities, in which mistakes would drown
    return model


def save_tiny(directory: Path, name: str = "llama-gqa", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save a tiny model with its tokenizer. `options`: shard_size for save_pretrained, the rest changes the config."""
    shard_size = options.pop("shard_size", "1GB")
    model = tiny_model(name, **options).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: enough to turn any text into ids below 384."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def some_text(words: int = 2000, seed: int = 0) -> str:
    """Varied text of about six bytes a word."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (words, 5), generator=generator).tolist()
    return " ".join("".join(map(chr, word)) for word in letters)
