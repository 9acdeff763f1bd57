"""A sample of what the policy wrote in each step, with its reward: completions.jsonl, and a table for wandb."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from trainer.batches.step_batch import StepBatch, TrainSequence

FILE = "completions.jsonl"
MAX_BYTES = 32 * 2**20
"""Of the file before it is set aside; the part before it is kept, so twice this is on disk at most."""
ROWS_A_STEP = 8
"""Where no probability is given: enough to read, small enough for every step."""
MOST_ROWS_A_STEP = 64
"""With a probability: what a step may take at most."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class CompletionRow:
    """One sequence, for people."""

    step: int
    group_id: str
    prompt: str
    """Decoded up to the first token that the policy sampled."""
    completion: str
    """Decoded from there on; in several turns, with what came between."""
    reward: float
    tokens: int
    """Sampled."""
    is_truncated: bool
    policy_version: int | None
    """The oldest of its trained tokens."""


def chosen(batch: StepBatch, *, probability: float | None, seed: int) -> list[int]:
    """Which sequences of a batch are shown, by their place. The same whenever a step is repeated.

    Args:
        probability: of each sequence; None takes ROWS_A_STEP of them.
    """
    generator = np.random.default_rng((seed, batch.step))
    count = len(batch.sequences)
    if probability is None:
        picked = generator.permutation(count)[:ROWS_A_STEP]
    else:
        picked = generator.permutation(np.flatnonzero(generator.random(count) < probability))[:MOST_ROWS_A_STEP]
    return sorted(int(i) for i in picked)


def rows_of(batch: StepBatch, places: Sequence[int], decode: Decode) -> list[CompletionRow]:
    """The table of some sequences."""
    return [_row(batch, batch.sequences[i], decode) for i in places]


class CompletionsFile:
    """completions.jsonl of a bounded size. A resumed run writes the steps that it repeats again; the last counts."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path = folder / FILE
        self._max_bytes = max_bytes

    def append(self, rows: Sequence[CompletionRow]) -> None:
        """Write the rows of a step. Not flushed to disk: they are there to be read, not to be counted."""
        if self._path.is_file() and self._path.stat().st_size >= self._max_bytes:
            self._path.replace(self._path.with_suffix(".1.jsonl"))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def send_to_wandb(rows: Sequence[CompletionRow]) -> None:
    """Add the rows as a table to what wandb gets next; nothing without a wandb run."""
    import wandb

    if not rows or wandb.run is None:
        return
    columns = list(asdict(rows[0]))
    table = wandb.Table(columns=columns, data=[list(asdict(row).values()) for row in rows])
    # commit=False: the figures of the step follow, and make one entry with it.
    wandb.log({"completions": table}, commit=False)


def _row(batch: StepBatch, sequence: TrainSequence, decode: Decode) -> CompletionRow:
    tokens = sequence.tokens_L.tolist()
    start = _completion_start(sequence)
    return CompletionRow(
        step=batch.step,
        group_id=batch.group_ids[sequence.group_index],
        prompt=decode(tokens[:start]),
        completion=decode(tokens[start:]),
        reward=sequence.reward,
        tokens=sequence.completion_tokens,
        is_truncated=sequence.is_truncated,
        policy_version=sequence.oldest_version,
    )


def _completion_start(sequence: TrainSequence) -> int:
    if sequence.trained_tokens:
        return int(np.argmax(sequence.is_trained_L))
    # A masked sequence does not say where; with one turn the completion is its end.
    return len(sequence.tokens_L) - sequence.completion_tokens
