"""python -m llmq.verify DIR: check that a packed checkpoint is sound, and compare it with its original."""

import json
from functools import partial

from llmq.cli import run
from llmq.verification.compare import VerifyConfig, verify
from llmq.verification.stated_share import SHARE


def verify_command(config: VerifyConfig) -> None:
    """Verify the checkpoint and print the result."""
    result = verify(config)
    if config.json:
        print(json.dumps(result))
        return
    for name, error in result.get("layer_errors", {}).items():
        print(f"{name:<58} {error:9.2e}")
    compared = "are what was computed" if result["compared_with_report"] else "can be decoded (there is no report)"
    print(f"sound: {result['packed_layers']} packed layers and {result['other_tensors']} other tensors {compared};")
    print("the model runs with them, and its logits are finite")
    if share := result[SHARE]:
        print(share)
    if unused := result["without_place"]:
        print(f"it has no place for {len(unused)} of the tensors, such as {unused[0]}")
    if fault := result["transformers"]:
        print(f"note: {fault}, with llmq.convert")
    if "kl" in result:
        kl = "not finite" if result["kl"] is None else f"{result['kl']:.5f} nats per token"
        print(f"KL to {result['reference']} on {result['text']}: {kl}")


main = partial(run, VerifyConfig, verify_command)

if __name__ == "__main__":
    main()
