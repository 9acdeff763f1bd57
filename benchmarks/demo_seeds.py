"""The demo on several seeds, one after another: held-out reward before and after, wall time, what was counted.

python benchmarks/demo_seeds.py 0 1 2
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COLUMNS = (
    "heldout_reward_before", "heldout_reward_after", "steps", "wall_s", "sequences_trained", "sequences_lost",
    "sequences_repeated", "max_staleness_seen",
)  # fmt: skip


def main() -> None:
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]
    rows = []
    for seed in seeds:
        run = Path("runs") / f"demo-seed-{seed}"
        command = ["atropos", "up", "--config", "configs/demo.yaml", f"seed={seed}", f"name={run.name}"]
        print(f"$ {' '.join(command)}", flush=True)
        started = set(Path("runs").glob(f"{run.name}*"))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (folder,) = set(Path("runs").glob(f"{run.name}*")) - started or {run}
        rows.append((seed, json.loads((folder / "summary.json").read_text())))
    print("| seed | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for seed, summary in rows:
        print(f"| {seed} | " + " | ".join(_show(summary.get(column)) for column in COLUMNS) + " |")


def _show(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
