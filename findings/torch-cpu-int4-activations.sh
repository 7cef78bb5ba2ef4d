#!/bin/sh
# torch 2.13.0, CPU: the int4 matmul takes float32 and float16 activations, but then runs many times as long as in bfloat16.
#
# aten::_weight_int4pack_mm_for_cpu accepts activations (with scales of the same dtype) in bfloat16, float16 and float32,
# and gives right results for all of them. Only bfloat16 has a vectorized loop; the other two go through a scalar one,
# without a message. For one token and a 2048x2048 weight that is slower than a dense float32 product, whose weight is
# eight times as large. Way out: round the activations to bfloat16, or multiply in another way. (docs/kernels.md; llmq
# does so.)
#
# Seen on 2026-11-28, 2-core AVX2 machine, one thread (the times differ between machines; the order does not):
#   one token, 2048x2048, groups of 128: bfloat16 0.7 ms, float16 11.5 ms, float32 9.8 ms, dense float32 0.6 ms
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
N = K = 2048
codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
exact = (codes - 8).double() * 0.01
x = torch.randn(1, K)


def milliseconds(call):
    call()
    times = []
    for _ in range(15):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times)[len(times) // 2]


times = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    grid = torch.stack([torch.full((K // 128, N), 0.01), torch.zeros(K // 128, N)], -1).to(dtype)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    y = product(x.to(dtype), packed, 128, grid)
    assert (y.double() - x.double() @ exact.T).norm() / (x.double() @ exact.T).norm() < 0.01, "wrong result"
    times[str(dtype).removeprefix("torch.")] = milliseconds(lambda: product(x.to(dtype), packed, 128, grid))
dense = torch.randn(N, K)
times["dense float32"] = milliseconds(lambda: torch.nn.functional.linear(x, dense))
parts = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
print(f"one token, {N}x{K}, groups of 128: {parts}")
for name in ("float16", "float32"):
    assert times[name] > 4 * times["bfloat16"], f"{name} is no longer slow"
    assert times[name] > 2 * times["dense float32"], f"{name} is no longer slower than a dense product"
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
