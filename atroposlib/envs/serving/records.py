"""What an environment leaves in the run folder: ledger, sample rollouts, metrics. One JSON object a line, flushed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TextIO

from atroposlib.type_definitions import MASKED, ScoredDataGroup
from atroposlib.wire.columns import Group


class RunRecords:
    """The files of one environment in a run folder; with no folder nothing is written.

    Args:
        run_dir: the run's folder, shared with the other processes of the run.
        env_name: names the ledger: each environment has its own.
    """

    def __init__(self, run_dir: Path | None, env_name: str) -> None:
        self._run_dir = run_dir
        self._ledger_name = f"ledger/env-{env_name.replace('/', '_')}.jsonl"
        self._files: dict[str, TextIO] = {}

    @property
    def is_kept(self) -> bool:
        """Whether there is a folder to write to."""
        return self._run_dir is not None

    def accepted(self, group_id: str, n_sequences: int) -> None:
        """The rollout server answered 2xx for this group: it must reach the trainer."""
        self._append(self._ledger_name, {"group_id": group_id, "sequences": n_sequences})

    def rollout(self, record: dict[str, Any]) -> None:
        """One sequence for people to read."""
        self._append("rollouts.jsonl", {"time": time.time(), **record})

    def metrics(self, record: dict[str, Any]) -> None:
        """Counters and gauges of the environment."""
        self._append("env_metrics.jsonl", {"time": time.time(), **record})

    def evaluation(self, record: dict[str, Any]) -> None:
        """The result of one evaluation."""
        self._append("evals.jsonl", {"time": time.time(), **record})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self._run_dir is None:
            return
        if name not in self._files:
            path = self._run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("a", encoding="utf-8")
        file = self._files[name]
        # One write and one flush: several environments append to the same files, and a killed process loses no line.
        file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        file.flush()


def sample_rollout(group: ScoredDataGroup, columns: Group, tokenizer: Any, *, env: str, step: int) -> dict[str, Any]:
    """The group's first sequence, for people."""
    tokens, labels = group["tokens"][0], group["masks"][0]
    first = next((i for i, label in enumerate(labels) if label != MASKED), len(tokens))
    decode = tokenizer.decode if tokenizer is not None else str
    return {
        "env": env,
        "group_id": columns.group_id,
        "step": step,
        "version": columns.version_range[1] if columns.version_range else None,
        "prompt": decode(tokens[:first]),
        "completion": decode(tokens[first:]),
        "reward": float(group["scores"][0]),
        "rewards": [float(score) for score in group["scores"]],
    }
