"""A training step on skewed lengths, ours against TRL's GRPOTrainer: tokens/s and peak memory.

    python -m benchmarks.trainer
    python -m benchmarks.trainer --micro-batch 4 8 16 --median-tokens 64 --max-tokens 512

Both train SmolLM2-135M (float32 weights, bfloat16 passes, AdamW) on the very same tokens with the same allocator settings, in
turns; sampling is not part of it. TRL runs with each --micro-batch, and its best counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers import peer_python
from benchmarks.rollout_server.processes import ROOT
from benchmarks.rollout_server.report import progress, save, table
from benchmarks.trainer.workload import Workload, steps_of, write

TIMEOUT_S = 1800.0
VOCABULARY = 49152
# Freed memory stays in the process: page faults of the next micro batch cost more than the memory. The same for both.
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_MMAP_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}


def run(command: list[str | Path], *, cwd: Path, threads: int) -> dict[str, Any]:
    """One program; its last line is JSON."""
    env = {
        **os.environ,
        **ALLOCATOR,
        "OMP_NUM_THREADS": str(threads),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[1:4]} failed: {done.stderr[-1500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4, 8], help="TRL's sequences of a pass (4 8)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both (all cores)")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for our trainer")
    defaults = Workload()
    for name in (
        "steps",
        "groups",
        "group_size",
        "prompt_tokens",
        "median_tokens",
        "sigma",
        "max_tokens",
        "zero_variance",
    ):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    args = parser.parse_args()
    workload = Workload(**{name: getattr(args, name) for name in asdict(defaults) if name != "seed"})
    steps = steps_of(workload, vocabulary=VOCABULARY)
    tokens = [sum(len(one.prompt_ids) + len(one.completion_ids) for one in step) for step in steps]
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "workload.json", workload, steps)
        for repetition in range(args.repetitions):
            for micro_batch in args.micro_batch:
                progress(f"TRL, micro batch {micro_batch}, repetition {repetition + 1}")
                command: list[str | Path] = [peer_python("trl"), "-P", ROOT / "benchmarks" / "trainer" / "trl_steps.py"]
                arguments: list[str | Path] = [args.model, folder / "workload.json", str(micro_batch), folder / "trl"]
                answer = run([*command, *arguments], cwd=folder, threads=args.threads)
                results.setdefault(f"TRL, micro batch {micro_batch}", []).append(answer)
            progress(f"ours, repetition {repetition + 1}")
            command = [sys.executable, "-m", "benchmarks.trainer.our_steps"]
            arguments = [args.model, folder / "workload.json", folder / f"ours-{repetition}", *args.override]
            results.setdefault("ours", []).append(run([*command, *arguments], cwd=ROOT, threads=args.threads))
    rows = []
    for program, runs in results.items():
        seconds, cpu_seconds = (
            statistics.median(s for answer in runs for s in answer[kind][1:]) for kind in ("seconds", "cpu_seconds")
        )
        peak_gib = statistics.median(answer["peak_bytes"] for answer in runs) / 2**30
        rows.append([program, seconds, cpu_seconds, statistics.mean(tokens[1:]) / seconds, peak_gib])
    fastest = max(row[3] for row in rows if row[0] != "ours")
    least = min(row[4] for row in rows if row[0] != "ours")
    least_cpu = min(row[2] for row in rows if row[0] != "ours")
    shown = [[*row, row[3] / fastest, least_cpu / row[2], row[4] / least] for row in rows]
    columns = ["trainer", "s/step", "CPU s/step", "real tokens/s", "peak GiB"]
    print(table([*columns, "x TRL's fastest", "x TRL's least CPU", "x TRL's least memory"], shown))
    save("trainer-step", {"workload": asdict(workload), "tokens": tokens, "results": results})


if __name__ == "__main__":
    main()
