"""The sizes of tiny models: small, but as divisible as those of real models.

llmq packs matrices whose sides are multiples of 32. So a side is a multiple of 32 here where it is one in the models
that people use, and the share of weights that is packed says something about them. Examples:

    Mamba-2     in_proj has 2*d_inner + 2*n_groups*state + heads rows; Mamba Codestral: 16384 + 2048 + 128.
    MLA         kv_a_proj_with_mqa has kv_lora_rank + qk_rope_head_dim rows; DeepSeek-V3: 512 + 64.
    Mamba-1     x_proj has dt_rank + 2*state rows; Falcon-Mamba 7B: 256 + 32.
    Qwen3-Next  in_proj_ba has 2 rows for each of 32 value heads.

A router has 4 rows here, one for each expert, so it stays in float; with 8 experts it does so in real models, too.
"""

from __future__ import annotations

from typing import Any

HIDDEN, HEADS, KV_HEADS, VOCABULARY = 64, 4, 2, 384
DEPTH = 2


def _all(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


# Applied to each field that the config class has, whatever the class.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    **_all(HIDDEN, "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"),
    **_all(
        128, "intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff", "d_inner"
    ),
    **_all(
        128, "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"
    ),
    **_all(DEPTH, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    **_all(DEPTH, "num_encoder_layers", "num_decoder_layers"),
    **_all(
        HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"
    ),
    **_all(HEADS, "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_all(HEADS, "swa_num_attention_heads"),
    **_all(KV_HEADS, "num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"),
    **_all(16, "head_dim", "swa_head_dim", "kv_channels", "dim_head", "attention_head_size", "rotary_dim"),
    **_all(256, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
    **_all(16, "sliding_window", "attention_window_size", "sliding_window_size", "window_size", "attention_chunk_size"),
    # mixtures of experts
    **_all(4, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    **_all(2, "num_experts_per_tok", "moe_topk", "moe_k"),
    **_all(64, "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    **_all(64, "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_experts_intermediate_size"),
    **_all(1, "n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    **_all(1, "first_k_dense_replace", "num_dense_layers"),
    # multi-head latent attention, and its index of tokens
    **_all(32, "kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    **_all(32, "index_head_dim", "index_n_heads"),
    "index_topk": 16,
    # state space models: d_inner is 128 = 32 heads of 4
    **_all(32, "mamba_n_heads", "mamba_num_heads"),
    **_all(4, "mamba_d_head", "mamba_head_dim"),
    **_all(1, "mamba_n_groups", "n_groups", "mamba_ngroups"),
    **_all(16, "mamba_d_state", "state_size", "ssm_state_size", "chunk_size", "mamba_chunk_size"),
    **_all(32, "time_step_rank", "mamba_dt_rank"),
    "mamba_d_ssm": 128,
    # linear attention: 32 value heads
    **_all(4, "linear_key_head_dim", "linear_value_head_dim"),
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    # vision towers
    **_all(DEPTH, "depth"),
    **_all(HIDDEN, "out_hidden_size", "projector_input_dim", "projector_output_dim", "vision_output_dim"),
    "image_size": 56,
    "patch_size": 14,
    # what only few classes have
    **_all(383, "image_token_id", "image_token_index"),
    **_all(True, "is_decoder"),
    **_all(32, "linear_num_heads"),
    **_all(4, "linear_head_dim"),
    **_all(0, "num_mtp_layers", "num_nextn_predict_layers"),
    "query_pre_attn_scalar": 16,
    "type_vocab_size": 2,
}

# Some matrices that no nn.Linear multiplies with grow slower than the others. These models are wider, or they would say
# the wrong thing of real ones: dt_proj is 2 % of a block of Mamba 2.8B, but a tenth of one with 64 inputs.
# Inkling's shared experts are a hundredth of all, so it has more than four.
_MAMBA = {"hidden_size": 512}
_JAMBA = {"hidden_size": 256, "attn_layer_period": 2, "attn_layer_offset": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY}
_GEMMA4 = {"global_head_dim": 32, **_PER_LAYER}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_QWEN4 = {"hc_lowrank": 32, "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "heads_per_ngram": 2}
_QWEN4 |= {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 16}
_QWEN4 |= {"indexer_compress_ratio": 4, "split_ngram_parts": 2}
_DOTS3 = {f"swa_{name}": COMMON[name] for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
_DOTS3 |= {"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_head_dim": 64, "head_dim": 64}
_ONE_OF_EACH = ["linear_attention", "full_attention"]

# More for one model type, or other values. What follows an @ names a variant.
BY_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]}
    | {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "cpmant": {"prompt_length": 4},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8, "rope_theta": 10000.0}}
    | {"ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN}}
    | {"audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 16}},
    "dots3_note_text": _DOTS3,
    "emu3@image": {"vq_config": {"base_channels": 32, "embed_dim": 32, "codebook_size": 64}}
    | {"vocabulary_map": {"<image>": 383, "<|extra_200|>": 382, "<|visual token 000000|>": 381}},
    "falcon@40b": {"new_decoder_architecture": True},
    "falcon_mamba": _MAMBA,
    "falcon@rw": {"alibi": True, "num_kv_heads": HEADS, "multi_query": False, "parallel_attn": False, "bias": True},
    "gemma3n_text": _SHARED | _PER_LAYER | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 32},
    "gemma4": {"text_config": _GEMMA4, "vision_config": {"position_embedding_size": 64}, "audio_config": None},
    "gemma4_text": _GEMMA4,
    "gemma4_text@dense": _GEMMA4 | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    "gemma4_text@moe": _GEMMA4
    | {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    "gemma4_text@shared": _GEMMA4 | _SHARED | {"use_double_wide_mlp": True},
    "gemma4_unified": {"text_config": _GEMMA4, "vision_config": {"mm_embed_dim": HIDDEN, "mm_posemb_size": 64}},
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe@dense": {"first_k_dense_replace": DEPTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": _ONE_OF_EACH},
    "granitemoehybrid@dense": {"layer_types": _ONE_OF_EACH, "num_local_experts": 0},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 32},
    "jamba": _JAMBA,
    "jamba@dense": _JAMBA | {"num_experts": 1},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "llama4@image": {"text_config": {"interleave_moe_layer_step": 2}},
    "longcat_flash": {"num_layers": 1, "head_dim": 32, "zero_expert_num": 2},
    "mamba": _MAMBA,
    "mamba2": {"num_heads": 32, "head_dim": 4},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 8}
    | {"mlp_layer_types": ["dense", "sparse"], "index_topk_blocks": 2, "index_n_heads": KV_HEADS},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral3": {"text_config": {"model_type": "mistral"}},
    "mllama@image": {"text_config": {"cross_attention_layers": [1]}},
    "nemotron_h@dense": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "phi4_multimodal": {"vision_config": {"crop_size": 56}, "audio_config": {"num_blocks": 1, "nemo_conv_channels": 8}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}}
    | {"vision_config": {"fullatt_block_indexes": [1], "num_heads": HEADS}},
    "qwen3_5@image": {"vision_config": {"num_position_embeddings": 16}},
    "qwen3_moe@mixed": {"mlp_only_layers": [0]},
    "qwen3_vl": {"vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "hidden_size": 128, "num_attention_heads": 8}
    | {"lru_width": 128, "intermediate_size": 768},
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 128,
        "num_buckets": 4,
    }
    | {"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "hash_seed": 0},
    "rembert": {"input_embedding_size": HIDDEN, "output_embedding_size": HIDDEN},
    "roc_bert": {"pronunciation_embed_dim": 32, "shape_embed_dim": 32, "pronunciation_vocab_size": VOCABULARY}
    | {"shape_vocab_size": VOCABULARY},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}
    | {"num_hidden_layers": 4, "hidden_size": 512},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
    | {"n_mamba_heads": 32, "adapter_rank": 32},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "router_hidden_size": 32},
}

NOT_BUILT = {
    "blt": "works on bytes in patches that a model of its own finds; it has no list of decoder blocks over tokens",
    "emu3": "transformers reads it only with the tower for pictures: see emu3@image",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is its language model",
    "gemma4_assistant": "drafts for Gemma 4: it reads that model's hidden states, not text alone",
    "gemma4_unified_assistant": "drafts for Gemma 4: it reads that model's hidden states, not text alone",
    "mllama": "transformers reads it only with the tower for pictures: see mllama@image",
    "musicgen": "its decoder writes the codes of music",
    "musicgen_melody": "its decoder writes the codes of music",
}
