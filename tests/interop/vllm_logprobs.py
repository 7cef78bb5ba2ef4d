"""Write what vLLM makes of a checkpoint as JSON. Run by test_vllm.py with the Python of .venv-vllm, which has no llmq.

Arguments: the checkpoint's directory, the file to write, then the ids of a prompt.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    # It takes 0.92 of the memory otherwise, and fails if so much is not free.
    model = LLM(model=sys.argv[1], max_model_len=256, enforce_eager=True, gpu_memory_utilization=0.2)
    ids = [int(word) for word in sys.argv[3:]]
    options = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0)
    (request,) = model.generate({"prompt_token_ids": ids}, options)
    logprobs = [entry[token].logprob for token, entry in zip(ids[1:], request.prompt_logprobs[1:], strict=True)]
    Path(sys.argv[2]).write_text(json.dumps({"logprobs": logprobs, "text": request.outputs[0].text}))


if __name__ == "__main__":
    main()
