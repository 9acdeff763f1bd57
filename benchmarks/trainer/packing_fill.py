"""How full our packing makes micro batches, how even the ranks' work is, and how long it takes.

    python -m benchmarks.trainer.packing_fill

Fill is real tokens over micro batches times their cap. TRL's figures are of its TokenBudgetBatcher on lengths of the same
kind, measured earlier; attention is the sum of squared lengths of the busiest rank over the mean.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from benchmarks.rollout_server.report import table
from trainer.batches.packing import pack_for_ranks

HIDDEN_SIZE = 1024


@dataclass(frozen=True)
class Case:
    """Lengths of one step, and where they go."""

    sequences: int
    tokens: int
    ranks: int
    capacity: int
    trl_fill: float | None
    sigma: float = 0.9


CASES = (
    Case(128, 90_000, 1, 4096, 0.893),
    Case(512, 1_270_000, 8, 16384, 0.661),
    Case(1024, 5_950_000, 8, 32768, 0.699),
    Case(10_000, 6_000_000, 8, 4096, None),
)


def lengths_of(case: Case) -> list[int]:
    """Log-normal, of about the case's number of tokens."""
    drawn = np.random.default_rng(0).lognormal(0.0, case.sigma, case.sequences)
    return np.clip(drawn * case.tokens / drawn.sum(), 8, case.capacity).astype(int).tolist()  # type: ignore[no-any-return]


def measure(case: Case) -> list[str | int | float | None]:
    """A row of the table."""
    lengths = lengths_of(case)
    start = time.perf_counter()
    shares = pack_for_ranks(lengths, capacity=case.capacity, ranks=case.ranks, hidden_size=HIDDEN_SIZE)
    seconds = time.perf_counter() - start
    passes = sum(bool(plan) for share in shares for plan in share)
    squares = [sum(lengths[i] ** 2 for plan in share for i in plan) for share in shares]
    fill = sum(lengths) / (passes * case.capacity)
    least = -(-sum(lengths) // (case.capacity * case.ranks)) * case.ranks
    return [
        case.sequences, sum(lengths), case.ranks, case.capacity, passes, least, fill, case.trl_fill,
        max(squares) / float(np.mean(squares)), 1e3 * seconds,
    ]  # fmt: skip


def main() -> None:
    columns = ["sequences", "tokens", "ranks", "cap", "passes", "least possible", "fill", "TRL's", "attention", "ms"]
    print(table(columns, [measure(case) for case in CASES]))


if __name__ == "__main__":
    main()
