"""Measure what one call of a packed linear costs beside its arithmetic, in microseconds of a CPU.

    python scripts/bench_calls.py

The layers are tiny, so that their arithmetic takes no time. The rows: torch's own linear; a packed linear called from
Python, on a CPU; the same as one operator of torch, as gradients and torch.compile need it; and the way to a GPU, up to
the launch of the kernel, which is left out here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from llmq_kernels import op
from llmq_kernels.choose import Device
from torch import nn

from llmq.core.quantized_weight import QuantizedWeight
from llmq.runtime.packed_linear import PackedLinear

_SIZE = 32


def tiny_layer() -> PackedLinear:
    """Return a packed linear of 32 inputs and outputs."""
    q = torch.full((_SIZE, _SIZE), 7, dtype=torch.uint8)
    grid = torch.ones(_SIZE, 1, dtype=torch.float16), torch.full((_SIZE, 1), 8, dtype=torch.uint8)
    return PackedLinear.from_codes(QuantizedWeight(q, *grid, 4))


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Return the CPU time of a call: the median of nine rounds."""
    call()
    rounds = []
    for _ in range(9):
        started = time.process_time()
        for _ in range(calls):
            call()
        rounds.append((time.process_time() - started) / calls * 1e6)
    return statistics.median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls of a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    packed, dense, x = tiny_layer(), nn.Linear(_SIZE, _SIZE, bias=False), torch.randn(1, 1, _SIZE)
    far, there = tiny_layer().to("meta"), torch.empty(1, 1, _SIZE, dtype=torch.bfloat16, device="meta")
    y = torch.empty(1, _SIZE, device="meta")
    # On a GPU, a layer's forward comes to `launched`. Tensors without memory stand for those of a GPU here.
    gpu = mock.patch.multiple(op, describe=lambda _: Device("no GPU", 90, 1, 1), _on_gpu=lambda *_: y, run=op.launched)
    learned = x.clone().requires_grad_()
    with torch.inference_mode():
        rows = {"nn.Linear": microseconds(lambda: dense(x), args.calls)}
        rows["PackedLinear, CPU"] = microseconds(lambda: packed(x), args.calls)
        with gpu:
            rows["PackedLinear, GPU"] = microseconds(lambda: far(there), args.calls)
    rows["as an operator"] = microseconds(lambda: packed(learned), args.calls)
    for name, cost in rows.items():
        print(f"{name:18} {cost:6.1f} us a call")


if __name__ == "__main__":
    main()
