"""Measure how long a linear takes from its stored tensors to the layout of the kernels: decoding and packing.

    python scripts/bench_load.py                             # 11008x4096, 4 bit, groups of 128, every format
    python scripts/bench_load.py --against ../old-checkout   # takes turns with other code, and prints the ratio
    python scripts/bench_load.py --checkpoint demo-out/gptq-4bit   # and all of `llmq.load`

Every measurement is a new process. It prints medians. Seconds of all threads together are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def measure(form: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds that one linear of random codes takes, or a whole checkpoint if `form` is a directory."""
    import torch

    import llmq
    from llmq.checkpoint.reader import Checkpoint
    from llmq.core.quantized_weight import QuantizedWeight
    from llmq.formats import FORMATS
    from llmq.formats.scheme import Scheme
    from llmq.models.model_source import build_skeleton
    from llmq.runtime.model_config import model_config
    from llmq.runtime.packed_linear import PackedLinear

    torch.set_num_threads(args.threads)

    def load() -> Any:
        if form not in FORMATS:
            return load_model(form, "cpu")
        return PackedLinear.from_codes(FORMATS[form].decode("linear", tensors, scheme))

    load_model = llmq.load  # imports what it needs
    tensors, scheme = {}, Scheme(args.bits, args.group_size, True, zero_offset=int(form == "gptq"))
    if form not in FORMATS:
        build_skeleton(model_config(Checkpoint(Path(form))))  # imports the code of the model
    else:
        codes = torch.randint(0, 2**args.bits, (args.rows, args.columns), dtype=torch.uint8)
        scale = torch.rand(args.rows, args.columns // args.group_size).half()
        zero = torch.full(scale.shape, 2 ** (args.bits - 1), dtype=torch.uint8)
        tensors = FORMATS[form].encode("linear", QuantizedWeight(codes, scale, zero, args.bits), scheme)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    loaded = load()
    seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    del loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds | {"peak": peak / 2**10, "more": (peak - before) / 2**10}


def in_new_process(code: Path, form: str) -> dict[str, float]:
    """Return what `measure` returns in a process of its own, which imports llmq from the directory `code`."""
    environment = os.environ | {"PYTHONPATH": f"{code}{os.pathsep}{code / 'kernels'}"}
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", form]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line for each format and checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=11008, help="outputs of the linear")
    parser.add_argument("--columns", type=int, default=4096, help="inputs of the linear")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--formats", nargs="*", default=["gptq", "awq", "compressed-tensors"])
    parser.add_argument("--checkpoint", help="a packed checkpoint to load as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="processes per line; the medians are printed")
    parser.add_argument("--against", type=Path, help="another checkout of llmq, measured in turn with this one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    codes = [args.against.resolve(), _ROOT] if args.against else [_ROOT]
    for form in [*args.formats, *([args.checkpoint] if args.checkpoint else [])]:
        found: list[list[dict[str, float]]] = [[] for _ in codes]
        for _ in range(args.runs):
            for code, runs in zip(codes, found, strict=True):
                runs.append(in_new_process(code, form))
        medians = [{key: statistics.median(run[key] for run in runs) for key in runs[0]} for runs in found]
        for which, each in zip(["other", "this"][-len(codes) :], medians, strict=True):
            ratio = each["cpu"] / medians[0]["cpu"]
            times = f"{each['cpu']:7.3f} CPU s {each['wall']:7.3f} s {ratio:5.2f}x"
            print(f"{form:28} {which:5} {times}   {each['more']:5.0f} MiB more, peak {each['peak']:5.0f}", flush=True)


if __name__ == "__main__":
    main()
