"""vLLM on a CPU opens our checkpoints and computes what we do (`make interop`).

Its kernel for packed weights needs AVX-512. Without that, the test says so in the summary.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from packed import logits, pack
from transformers import AutoTokenizer

import llmq

CPU = Path("/proc/cpuinfo")
PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"  # its dependencies clash with ours

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        not CPU.is_file() or "avx512f" not in CPU.read_text(), reason="not run: this CPU has no AVX-512"
    ),
    pytest.mark.skipif(bool(os.environ.get("WITHOUT_VLLM")), reason="not run: WITHOUT_VLLM is set"),
]


def test_it_computes_what_we_do_on_the_demo_model(tmp_path):
    directory = pack("demo", tmp_path / "packed", blocks="0-2", group_size=64)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    script, found = Path(__file__).with_name("vllm_logprobs.py"), tmp_path / "found.json"
    command = [PYTHON, script, directory, found, *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(found.read_text())
    ours = logits(llmq.load(directory, "cpu", torch.float32), torch.tensor([ids]))[0].log_softmax(-1)
    expected = ours[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert "Paris" in theirs["text"]
    # It computes in 16 bits. The original demo model differs by 0.0033 (2-core AVX2 machine, 2026-11-29).
    assert (torch.tensor(theirs["logprobs"]) - expected).mean().abs() < 0.02
