"""Values that no sound checkpoint holds, and names and words that one may hold elsewhere."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = [0, 1, -1, 2, 3, 5, 8, 16, 33, 64, 10**6, 10**12, -(10**12), 2**31, 2**63, 2**64, 10**400]
FLOATS = [0.5, 4.0, -0.0, 1e-30, 1e308, float("nan"), float("inf"), float("-inf")]
WORDS = ["", "4", "-1", "x", "a\nb\nc\nd", "\x1b[2J\r", "\u2028\ud800", "x" * 5000, "re:", "../x", "int", "float16"]
TREES: list[Any] = [
    [],
    [1],
    ["x"],
    [[1]],
    [None] * 50,
    {},
    {"a": 1},
    {"": {"": {}}},
    {"bits": 0},
    json.loads("[" * 500 + "]" * 500),
]
# All characters but surrogates. They are what st.text() takes too, after it has tried for two seconds to encode each.
CHARACTERS = st.characters(exclude_categories=["Cs"])
strange = (
    st.sampled_from([*NUMBERS, *FLOATS, *WORDS, *TREES, None, True, False])
    | st.integers()
    | st.text(CHARACTERS, max_size=5)
)

PATTERNS = [
    ".*",
    "re:.*",
    "re:.*proj",
    "-:.*",
    "+:.*down.*",
    "re:(.*a)*x$",
    "(.*)*(.*)*(.*)*!",
    "re:[",
    "(?R)",
    "(?<n>.)(?P>n)*",
    "(?:" * 3000,
    "a{99999}{99999}",
    "re:" + "(" * 200 + ")" * 200,
    "\\p{x}",
    "(?e)(?:proj){e<=9}",
    "re:\\N{x}",
]

# Settings that transformers or some format knows, beside those that the file has.
_MODEL_KEYS = """
    num_labels return_dict attn_implementation _attn_implementation experts_implementation output_attentions
    output_hidden_states num_experts layer_types sliding_window rope_parameters rope_scaling rope_theta head_dim
    dtype torch_dtype auto_map configuration_files text_config vision_config is_encoder_decoder pretraining_tp
    mlp_bias attention_bias partial_rotary_factor id2label chunk_size_feed_forward pruned_heads problem_type
    to_dict n_layer get_text_config decoder_layers encoder use_cache architectures max_window_layers
    first_k_dense_replace name_or_path _commit_hash tie_word_embeddings quantization_config generation_config
    model_type vocab_size _name_or_path
"""
MODEL_KEYS = _MODEL_KEYS.split()
_MODEL_TYPES = """
    llama mistral qwen2 qwen3 gemma2 mixtral gpt2 bart xlm bert mamba llava opt phi3
"""
MODEL_TYPES = _MODEL_TYPES.split()
_QUANTIZATION_KEYS = """
    bits w_bit group_size q_group_size sym zero_point desc_act checkpoint_format format pack_dtype dynamic
    extra_config data_type act_bits packing_format backend version modules_to_not_convert ignore targets
    config_groups quant_method lm_head quant_type actorder strategy type num_bits mode
    model.layers.0.mlp.up_proj
"""
QUANTIZATION_KEYS = _QUANTIZATION_KEYS.split()
_DTYPES = """
    F64 F32 F16 BF16 I64 I32 I16 I8 U8 U16 U32 U64 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 f32
"""
DTYPES = _DTYPES.split()
_VALUES = "gptq gptq_v2 awq gemm gemv auto-round auto_round auto_round:auto_awq auto_round:auto_gptq compressed-tensors"
VALUES = [*_VALUES.split(), "pack-quantized", "group", "channel", "tensor", "int", "float", "marlin", "int64", "affine"]
