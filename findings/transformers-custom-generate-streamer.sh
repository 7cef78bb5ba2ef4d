#!/bin/sh
# transformers 5.23.0 (torch 2.13.0): `generate` with a callable `custom_generate` does not hand it the streamer.
#
# A custom loop is called like transformers' own loops, and may name `streamer` among its arguments, as those do.
# transformers' own loops get the streamer. A custom one gets None, without a message, so its text is not streamed: only
# the prompt is, by `generate` itself. (generation/utils.py, `_extract_generation_mode_kwargs`: for a callable only those
# arguments are kept which transformers' own loop does not have.) Way out: give the streamer to the loop by other means,
# such as a bound method. llmq's fast_generate does so.
#
# Seen on 2026-11-28:
#   own loop: 4 parts streamed
#   custom loop: streamer is None, 1 part streamed
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes))


class Parts:
    def __init__(self):
        self.count = 0

    def put(self, tokens):
        self.count += 1

    def end(self):
        pass


def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **inputs):
    loop.streamer = streamer
    for _ in range(3):
        token = model(input_ids).logits[:, -1].argmax(-1)
        if streamer is not None:
            streamer.put(token)
        input_ids = torch.cat([input_ids, token[:, None]], 1)
    return input_ids


prompt, own, custom = torch.tensor([[1, 2]]), Parts(), Parts()
model.generate(prompt, max_new_tokens=3, streamer=own)
model.generate(prompt, max_new_tokens=3, streamer=custom, custom_generate=loop)
print(f"own loop: {own.count} parts streamed")
print(f"custom loop: streamer is {loop.streamer}, {custom.count} part streamed")
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/run.py" 2> "$folder/errors" > "$folder/seen" || { cat "$folder/errors"; exit 1; }
cat "$folder/seen"
grep -qx "own loop: 4 parts streamed" "$folder/seen"
grep -qx "custom loop: streamer is None, 1 part streamed" "$folder/seen"
