"""What an environment leaves in the run folder: ledger, sample rollouts, metrics. One JSON object a line, flushed."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from atroposlib.errors import AtroposError
from atroposlib.type_definitions import MASKED, ScoredDataGroup
from atroposlib.wire.columns import Group

log = logging.getLogger(__name__)


class RunRecords:
    """The files of one environment in a run folder; with no folder nothing is written.

    Only the ledger must be whole. Other records are lost, and the log says so once, while the folder cannot be written.

    Args:
        run_dir: the run's folder, shared with the other processes of the run.
        env_name: names the ledger: each environment has its own.
    """

    def __init__(self, run_dir: Path | None, env_name: str) -> None:
        self._run_dir = run_dir
        self._ledger_name = f"ledger/env-{env_name.replace('/', '_')}.jsonl"
        self._files: dict[str, TextIO] = {}
        self._failed: set[str] = set()
        """Files that the log has named as not writable."""

    @property
    def is_kept(self) -> bool:
        """Whether there is a folder to write to."""
        return self._run_dir is not None

    def accepted(self, group_id: str, n_sequences: int) -> None:
        """The rollout server answered 2xx for this group: it must reach the trainer.

        Raises:
            AtroposError: the ledger cannot be written.
        """
        try:
            self._append(self._ledger_name, {"group_id": group_id, "sequences": n_sequences})
        except OSError as error:
            raise AtroposError(
                f"group {group_id} is accepted but cannot be entered into {self._ledger_name} of run_dir={self._run_dir}: "
                f"{error}; make room there, or set another run_dir"
            ) from error

    def accepted_ids(self) -> frozenset[str]:
        """Groups that the ledger holds, those of earlier processes too."""
        if self._run_dir is None or not (path := self._run_dir / self._ledger_name).exists():
            return frozenset()
        ids = set()
        with path.open(encoding="utf-8") as file:
            for line in file:
                with suppress(ValueError):  # a line that a full disk cut short
                    ids.add(json.loads(line)["group_id"])
        return frozenset(ids)

    def rollout(self, record: dict[str, Any]) -> None:
        """One sequence for people to read."""
        self._append_if_possible("rollouts.jsonl", {"time": time.time(), **record})

    def metrics(self, record: dict[str, Any]) -> None:
        """Counters and gauges of the environment."""
        self._append_if_possible("env_metrics.jsonl", {"time": time.time(), **record})

    def evaluation(self, record: dict[str, Any]) -> None:
        """The result of one evaluation."""
        self._append_if_possible("evals.jsonl", {"time": time.time(), **record})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append_if_possible(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._append(name, record)
        except OSError as error:
            if name not in self._failed:
                self._failed.add(name)
                log.warning("%s of run_dir=%s cannot be written, its records are lost: %s", name, self._run_dir, error)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self._run_dir is None:
            return
        line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
        try:
            # One write and one flush: several environments append to the same files, a killed process loses no line.
            file = self._open(self._run_dir, name)
            file.write(line)
            file.flush()
        except OSError:
            # The file still holds the line, and would fail with it again when it is closed.
            if (broken := self._files.pop(name, None)) is not None:
                with suppress(OSError):
                    broken.close()
            raise

    def _open(self, run_dir: Path, name: str) -> TextIO:
        if name not in self._files:
            path = run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("a", encoding="utf-8")
        return self._files[name]


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
