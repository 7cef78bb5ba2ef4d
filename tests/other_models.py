"""Tiny random models whose blocks are called in other ways than Llama's.

They return tuples, take what depends on the tokens, or leave keys and values for later blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_TOKENS = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96}
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
_LLAMA |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
_TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA = _LLAMA | _TWO_KINDS | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 384}

# name -> (model_type, its configuration)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Blocks return a tuple.
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "codegen": ("codegen", _GPT | {"rotary_dim": 8, "n_ctx": 256}),
    "cpmant": ("cpmant", _SMALL | {"dim_head": 16, "dim_ff": 96, "prompt_length": 4, "prompt_types": 4}),
    "falcon-7b": ("falcon", _SMALL | {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-40b": ("falcon", _SMALL | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False}),
    "falcon_h1": ("falcon_h1", _LLAMA | _MAMBA | {"num_hidden_layers": 2, "mamba_d_ssm": 128}),
    "gpt_neo": (
        "gpt_neo",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"max_position_embeddings": 256, "window_size": 8},
    ),
    "gpt_neox_japanese": ("gpt_neox_japanese", _SMALL | {"intermediate_multiple_size": 2}),
    "gptj": ("gptj", _GPT | {"rotary_dim": 8}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2}),
    "rwkv": ("rwkv", {"hidden_size": 64, "num_hidden_layers": 2, "context_length": 256, "rescale_every": 0}),
    "xlstm": ("xlstm", {"hidden_size": 64, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4}),
    # Masks and biases grow with the batch.
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    # Blocks of several kinds.
    "bamba": ("bamba", _LLAMA | _MAMBA | {"attn_layer_indices": [1], "num_hidden_layers": 2}),
    "granite-h": (
        "granitemoehybrid",
        _LLAMA
        | _MAMBA
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
        | {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    ),
    "jamba": ("jamba", _LLAMA | {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "lfm2": ("lfm2", _LLAMA | {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "mamba2": ("mamba2", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16}),
    "qwen3_5": (
        "qwen3_5_text",
        _LLAMA
        | {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
    "recurrent_gemma": ("recurrent_gemma", _LLAMA | {"num_hidden_layers": 3, "attention_window_size": 16}),
    # Arguments depend on the tokens.
    "gemma4": ("gemma4_text", _GEMMA | {"global_head_dim": 32}),
    "zamba2": (
        "zamba2",
        _LLAMA
        | {"layers_block_type": ["mamba", "hybrid", "hybrid", "mamba"], "num_key_value_heads": 4}
        | {"mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "num_mem_blocks": 1},
    ),
    # The last two blocks read keys and values of the first two.
    "gemma4-shared": ("gemma4_text", _GEMMA | {"global_head_dim": 32, "num_kv_shared_layers": 2}),
    # So they do here, and hidden states are [inputs, batch, tokens, features].
    "gemma3n": (
        "gemma3n_text",
        _GEMMA
        | {"num_kv_shared_layers": 2, "laurel_rank": 32, "activation_sparsity_pattern": [0.0] * 4}
        | {"intermediate_size": [96] * 4},
    ),
    # Decoders with modules that are made for an encoder.
    "bart": ("bart", {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}),
    "bert": ("bert", _LLAMA | {"is_decoder": True}),
}


def other_model(name: str) -> Any:
    """A random model in float32, whose blocks are far from identities."""
    model_type, options = OTHERS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_TOKENS | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 3
    return model


def save_other(directory: Path, name: str) -> Any:
    """Save a model with its tokenizer, and return it."""
    model = other_model(name)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model
