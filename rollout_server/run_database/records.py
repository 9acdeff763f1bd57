"""atropos records: what became of the groups of a recorded run, as a table."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atroposlib.wire.models import GroupRecord
from rollout_server.run_database.recorded import open_recorded

EXAMPLES = """examples:
  atropos records data/run1                    the run that the server in data/run1 has open
  atropos records data/run1/archive/demo-...   an earlier one
"""


@dataclass
class EnvCounts:
    """The groups of one environment."""

    groups: Counter[str] = field(default_factory=Counter)
    """By state."""
    trained_sequences: int = 0
    trained_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Of retired groups."""


@dataclass
class Summary:
    """Counted once over all records."""

    envs: defaultdict[int, EnvCounts] = field(default_factory=lambda: defaultdict(EnvCounts))
    first_step: int | None = None
    last_step: int | None = None


def summarise(records: Iterable[GroupRecord]) -> Summary:
    """Count records by environment; memory does not depend on how many there are."""
    summary = Summary()
    for record in records:
        counts = summary.envs[record.env_id]
        counts.groups[record.state] += 1
        if record.step is not None:
            counts.trained_sequences += record.n_sequences
            counts.trained_tokens += record.n_tokens
            summary.first_step = min(record.step, record.step if summary.first_step is None else summary.first_step)
            summary.last_step = max(record.step, record.step if summary.last_step is None else summary.last_step)
        if record.reason is not None:
            counts.reasons[record.reason] += 1
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand; its exit status. Raises ConfigError where the folder holds no run."""
    parser = argparse.ArgumentParser(
        prog="atropos records",
        description="Shows what became of the groups of a run. The run is only read.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="--data-dir of the server, or an archived run in it"
    )
    with closing(open_recorded(parser.parse_args(argv).folder)) as recorded:
        run, summary = recorded.run, summarise(recorded.records())
    steps = "none" if summary.first_step is None else f"{summary.first_step} to {summary.last_step}"
    console = Console()
    console.print(
        f"run {run.run_name} ({run.run_id}): steps {steps} of {run.request.num_steps}, {run.acknowledged_step} acknowledged,"
        f" {run.committed_step} in a checkpoint, policy version {run.policy_version}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(_table(summary.envs))
    return 0


def _table(envs: Mapping[int, EnvCounts]) -> Table:
    headings = ("env", "batched", "queued", "retired", "sequences", "tokens", "why retired")
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "why retired" else "right")
    for env_id, counts in sorted(envs.items()):
        table.add_row(
            str(env_id), *(str(counts.groups[state]) for state in ("batched", "queued", "retired")),
            str(counts.trained_sequences), str(counts.trained_tokens),
            ", ".join(f"{count} {reason}" for reason, count in sorted(counts.reasons.items())),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
