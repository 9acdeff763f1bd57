"""One configuration of `atropos up` on several seeds, one after another: held-out reward before and after, its
change with the 95 % interval over items, and what was counted.

python -m benchmarks.seeds                                                   the demo, seeds 0, 1 and 2
python -m benchmarks.seeds --config configs/teacher_quickstart.yaml 3 4
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

COLUMNS = (
    "heldout_reward_before", "heldout_reward_after", "heldout_change", "steps", "wall_s", "sequences_trained", "sequences_lost",
    "sequences_repeated", "max_staleness_seen",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), metavar="FILE")
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    rows = [(seed, summary_of(arguments.config, seed)) for seed in arguments.seeds]
    print("| seed | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for seed, summary in rows:
        print(f"| {seed} | " + " | ".join(_show(summary.get(column)) for column in COLUMNS) + " |")
    changes = [change["mean"] for _, summary in rows if isinstance(change := summary["heldout_change"], dict)]
    if len(changes) > 1:
        print(
            f"\nmean change {fmean(changes):+.3f}, standard error over {len(changes)} seeds {stdev(changes) / len(changes) ** 0.5:.3f}"
        )


def summary_of(config: Path, seed: int) -> dict[str, object]:
    """Run one seed to its end."""
    name = f"{config.stem}-seed-{seed}"
    arguments = ["up", "--config", str(config), f"seed={seed}", f"name={name}"]
    print(f"$ atropos {' '.join(arguments)}", flush=True)
    before = set(Path("runs").glob(f"{name}*"))
    subprocess.run([sys.executable, "-m", "atroposlib.cli.main", *arguments], check=True, stdout=subprocess.DEVNULL)
    (folder,) = set(Path("runs").glob(f"{name}*")) - before
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return summary


def _show(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
