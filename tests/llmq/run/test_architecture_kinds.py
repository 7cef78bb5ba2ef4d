"""One model of each kind of decoder is quantized twice, loaded in two ways, and generates.

`scripts/check_architectures.py` does the same for every decoder that transformers knows.
"""

import pytest
from architectures.check import LARGEST_RATIO, checked

# name -> the least share of the weights of the blocks that must be packed
KINDS = {
    "bloom": 0.95,  # ALiBi; its blocks return tuples
    "codegen": 0.95,
    "deepseek_v3": 0,  # latent attention; experts stay in float
    "falcon": 0.95,  # one key head, attention and MLP side by side
    "falcon_h1": 0.95,  # attention and state space side by side
    "gemma2": 0.95,
    "gemma3": 0.95,  # with a vision tower
    "gemma4_text": 0.95,  # inputs for each layer, which depend on the tokens
    "glm4": 0.95,
    "gpt_neo": 0.95,
    "gpt_oss": 0,
    "gptj": 0.95,
    "granitemoehybrid@dense": 0.95,  # Mamba-2 and attention
    "jamba@dense": 0.85,  # Mamba-1 and attention; dt_proj, never called as a linear, is large in a tiny model
    "lfm2": 0.95,  # short convolutions
    "llama": 0.95,
    "llama4_text": 0,
    "mamba": 0.95,
    "mamba2": 0.95,
    "mixtral": 0,
    "mpt": 0.95,
    "nemotron_h@dense": 0.95,
    "qwen3_5_text": 0.95,  # linear attention
    "qwen3_moe@mixed": 0,
    "qwen3_vl": 0.95,
    "recurrent_gemma": 0.90,  # its gates are 3-D parameters
    "xglm": 0.95,
}
# transformers 5.23 looks for the weights of packed linears when it initializes these models.
STOCK_FAILS = {"falcon", "mamba", "mamba2"}


@pytest.mark.parametrize("name", KINDS)
def test_both_methods_give_exact_logits_in_llmq_and_in_transformers(name, tmp_path):
    row = checked(name, tmp_path)
    stock_fails = name in STOCK_FAILS and row["result"].startswith("ok in llmq, stock transformers fails: Attribute")
    assert row["result"] == "ok" or stock_fails
    assert row["share"] >= KINDS[name], row["remark"]
    assert row["rtn_error"] < 0.6
    assert row["gptq_error"] <= LARGEST_RATIO * row["rtn_error"]
