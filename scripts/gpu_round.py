"""Check and measure everything that llmq claims of a GPU, in one call of under ten minutes on one GPU.

    python scripts/gpu_round.py --out gpu-round
    python scripts/plot_kernels.py --results gpu-round/round.jsonl --output plots

The most valuable steps come first: do the kernels run at all; a tiny model from end to end; the kernels' speed beside
cuBLAS, torch's tinygemm, humming and gemlite; a model of LLaMA-7B's shape through llmq.load; its quantization; a layer
of experts beside transformers' grouped matmul; tuning; all GPU tests; more tokens, widths and dtypes. Each step has a
time limit and a process of its own. What does not fit into the time is reported as not done; that is no failure. A
later call with --resume-from measures only what is missing. llmq need not be installed, nor tyro, beartype and
pytest-timeout.

The table at the end is also in round.md; its rows are those of docs/gpu.md. Exit code 1 means: something computed wrong
results or did not run. 2 means: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import report
from bench.claims import claims, markdown
from bench.plan import FULL, TOY
from bench.results import Results, is_good, rows_in
from bench.round import ROOT, STEPS, Round, Step

_INTERPRETER = "interpreter"
_SHOWN = 6
_TOY_PATIENCE = 4  # times as long: the CPU may be busy


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-round")), help="folder for the files"
    )
    parser.add_argument("--resume-from", type=Path, help="a round.jsonl of an earlier call; its good rows are kept")
    parser.add_argument("--seconds", type=float, default=570, help="time for everything (default 570)")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="steps to run")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use; they are not installed for good")
    parser.add_argument(
        "--toy", action="store_true", help="run tiny shapes in Triton's interpreter on a CPU: this measures nothing"
    )
    return parser.parse_args()


def environment(site: Path, work: Path, toy: bool) -> dict[str, str]:
    """Return the environment of the steps: they find llmq, the kernels and the wheels without an installation."""
    paths = [site, ROOT, ROOT / "kernels", ROOT / "scripts", *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONUNBUFFERED": "1", "TMPDIR": str(work)}
    changes |= {"HF_HUB_OFFLINE": "1"} | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if toy else {})
    return os.environ | changes


def install(wheels: Path, site: Path) -> None:
    """Unpack the wheels. What is missing then will be missed by what needs it."""
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--target", str(site)]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=False)


def run(round_: Round, options: argparse.Namespace, started: float) -> Results | None:
    """Run the steps, and write round.md after each. Returns the results, or None if there is no GPU."""

    def left() -> float:
        return started + options.seconds - time.perf_counter()

    round_.run(Step("machine", 60), 60, "")
    last = rows_in(round_.results.read_text(encoding="utf-8"))[-1]  # the step's own
    if not is_good(last):
        return None
    gpu = last["device"]
    for step in STEPS:
        row = Results(round_.results, gpu).steps().get(step.name)
        if (row and is_good(row) and not row["late"]) or (options.only and step.name not in options.only):
            continue
        if left() < step.least and not round_.toy:
            Results(round_.results, gpu).add("step", (step.name,), {"seconds": 0, "late": ["not begun"], "notes": []})
            continue
        print(f"[{time.perf_counter() - started:5.0f}s] {step.name} …", file=sys.stderr, flush=True)
        round_.run(step, min(step.seconds * (_TOY_PATIENCE if round_.toy else 1), left()), gpu)
        write(round_, Results(round_.results, gpu))
    return Results(round_.results, gpu)


def write(round_: Round, results: Results) -> None:
    """Write round.md: the claims, how the steps ended, and everything that was measured of the kernels."""
    plan = TOY if round_.toy else FULL
    lines = [
        title(results),
        "",
        *markdown(results, plan),
        "",
        "```",
        *endings(results),
        *report.lines(results, plan),
        "```",
    ]
    (round_.folder / "round.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def title(results: Results) -> str:
    toy = results.gpu == _INTERPRETER
    return results.gpu + (" — A TOY RUN: NOTHING HERE IS A MEASUREMENT" if toy else "")


def endings(results: Results) -> Iterator[str]:
    """Yield a line for each step, then what failed."""
    steps = results.steps()
    for step in STEPS:
        row = steps.get(step.name)
        if row is None:
            continue
        passed = f", {row['passed']} tests passed" if "passed" in row else ""
        late = f", {len(row['late'])} not done in time: {row['late'][0]}" if row["late"] else ""
        yield f"{step.name:9} {row['seconds']:6.1f} s{passed}{late}{', FAILED' if 'failed' in row else ''}"[:150]
    bad, notes = results.bad(), [note for row in steps.values() for note in row["notes"]]
    for row in bad[:_SHOWN]:
        what = row.get("failed") or "; ".join(row["wrong"])
        yield f"FAILED {' '.join(map(str, [row['kind'], *row['key']]))}: {what}"[:180]
    if len(bad) > _SHOWN:
        yield f"FAILED … and {len(bad) - _SHOWN} more in round.jsonl"
    yield from (f"note: {note}"[:150] for note in notes[:3])


def summary(results: Results, toy: bool) -> Iterator[str]:
    """Yield what is printed at the end. The claims are the last of it."""
    yield title(results)
    yield from endings(results)
    for claim in claims(results, TOY if toy else FULL):
        verdict = {None: "", True: "  reached", False: "  MISSED"}[claim.kept]
        yield f"{claim.what:84} {claim.bar:>12}  {claim.measured or 'not measured'}{verdict}"


def main() -> int:
    options, started = arguments(), time.perf_counter()
    folder: Path = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        site, work = Path(temporary, "site"), Path(temporary, "work")
        work.mkdir()
        if options.wheels:
            install(options.wheels, site)
            sys.path.append(str(site))
        round_ = Round(folder, environment(site, work, options.toy), options.toy)
        if options.resume_from and options.resume_from.resolve() != round_.results:
            with round_.results.open("a", encoding="utf-8") as file:
                file.write(options.resume_from.read_text(encoding="utf-8").rstrip("\n") + "\n")
        results = run(round_, options, started)
    if results is None:
        print((folder / "round.log").read_text(encoding="utf-8")[-2000:], file=sys.stderr)
        return 2
    write(round_, results)
    print("\n".join(summary(results, options.toy)))
    return 1 if any(row["kernels"] for row in results.bad()) else 0


if __name__ == "__main__":
    sys.exit(main())
