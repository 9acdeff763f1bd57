"""Evaluation of many items that can be interrupted: finished items are kept in a journal and not evaluated again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from atroposlib.envs.progress import progress as show_progress
from atroposlib.errors import infrastructure_error

log = logging.getLogger(__name__)

T = TypeVar("T")

JOURNAL_SUFFIX = ".journal.jsonl"
ITEM_TRIES = 3


async def evaluate_items(
    items: Sequence[T],
    score: Callable[[T], Awaitable[Any]],
    *,
    journal_path: Path | None = None,
    max_workers: int = 64,
    progress: bool = True,
    run_key: str = "",
    description: str = "evaluating",
) -> list[Any]:
    """Evaluate every item, some at a time; results in the order of the items.

    With a journal an interrupted evaluation goes on where it was: the journal is left behind when this is cut short,
    and removed when every item is done. It counts only for the same items and the same run_key.

    Args:
        score: its result must survive JSON when there is a journal. A RolloutError is tried again, up to ITEM_TRIES times.
        journal_path: ends in JOURNAL_SUFFIX, so that a fresh `evaluate` finds and forgets it.
        run_key: what the results depend on besides the items: model, policy version, sampling options.
    Raises:
        ExceptionGroup: an item failed. A partial evaluation is not a result.
    """
    journal = None if journal_path is None else EvalJournal(journal_path, _digest([run_key, *map(repr, items)]))
    results: dict[int, Any] = dict(journal.finished) if journal else {}
    slots = asyncio.Semaphore(max_workers)
    try:
        with show_progress(description, len(items), done=len(results), is_shown=progress) as advance:

            async def one(index: int, item: T) -> None:
                async with slots:
                    results[index] = await _with_retries(score, item)
                if journal is not None:
                    journal.add(index, results[index])
                advance()

            async with asyncio.TaskGroup() as tasks:
                for index, item in enumerate(items):
                    if index not in results:
                        tasks.create_task(one(index, item))
    finally:
        if journal is not None:
            journal.close()
    if journal is not None:
        journal.path.unlink(missing_ok=True)
    return [results[index] for index in range(len(items))]


def forget_journals(folder: Path) -> None:
    """Remove the journals of interrupted evaluations."""
    for path in folder.glob(f"*{JOURNAL_SUFFIX}"):
        path.unlink(missing_ok=True)


class EvalJournal:
    """Results by item index, one JSON line each, flushed.

    Args:
        path: made where it is missing.
        key: of the evaluation; a journal of another one is begun anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.finished: dict[int, Any] = _read(path, key)
        """Results that an earlier run left."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written again as a whole: a line that a kill cut short must not swallow the next one.
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"key": key}) + "\n")
        for index, result in self.finished.items():
            self._write(index, result)
        self._file.flush()

    def add(self, index: int, result: Any) -> None:
        """Keep one result.

        Raises:
            TypeError: JSON cannot hold it.
        """
        self._write(index, result)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, index: int, result: Any) -> None:
        self._file.write(json.dumps({"item": index, "result": result}, ensure_ascii=False) + "\n")


async def _with_retries(score: Callable[[T], Awaitable[Any]], item: T) -> Any:
    for attempt in range(1, ITEM_TRIES):
        try:
            return await score(item)
        except Exception as error:
            failure = infrastructure_error(error)
            if failure is None:
                raise
            log.warning("evaluation of an item failed, attempt %d of %d: %s", attempt, ITEM_TRIES, failure)
    return await score(item)


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[int, Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    entries = [entry for line in lines if (entry := _parse(line)) is not None]
    if not entries or entries[0].get("key") != key:
        return {}
    return {entry["item"]: entry["result"] for entry in entries[1:] if "item" in entry}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
