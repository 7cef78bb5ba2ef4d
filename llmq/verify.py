"""python -m llmq.verify DIR: is a packed checkpoint sound, is it what was computed, how far is it from the original."""

from __future__ import annotations

import json

from llmq.cli import run
from llmq.verification.compare import VerifyConfig, verify


def verify_command(config: VerifyConfig) -> None:
    """Verify and print."""
    found = verify(config)
    if config.json:
        print(json.dumps(found))
        return
    for name, error in found.get("layer_errors", {}).items():
        print(f"{name:<58} {error:9.2e}")
    compared = "are what was computed" if found["compared_with_report"] else "decode (no report says what was computed)"
    print(f"sound: {found['packed_layers']} packed layers and {found['other_tensors']} other tensors {compared};")
    print("the model runs on them and its logits are finite")
    if "kl" in found:
        kl = "not finite" if found["kl"] is None else f"{found['kl']:.5f} nats per token"
        print(f"KL to {found['reference']} on {found['text']}: {kl}")


def main() -> None:
    """Entry point; the flags are the fields of VerifyConfig."""
    run(VerifyConfig, verify_command)


if __name__ == "__main__":
    main()
