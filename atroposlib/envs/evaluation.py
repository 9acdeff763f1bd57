"""Evaluation: many items at once with a progress bar, and the files that a result is kept in."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from atroposlib.envs.eval_items import evaluate_items
from atroposlib.utils.display import display_metrics_table
from atroposlib.utils.plain_json import plain

T = TypeVar("T")
R = TypeVar("R")


async def map_items(
    items: Sequence[T], evaluate: Callable[[T], Awaitable[R]], *, concurrency: int = 64, description: str = "evaluating"
) -> list[R]:
    """Evaluate every item, some at a time; results in the order of the items. Shows a progress bar on a terminal.

    For one that can be interrupted and goes on later see eval_items.evaluate_items.

    Raises:
        ExceptionGroup: an item failed. A partial evaluation is not a result.
    """
    return await evaluate_items(items, evaluate, max_workers=concurrency, description=description)


def write_evaluation(
    folder: Path,
    metrics: dict[str, Any],
    *,
    task_name: str,
    model_name: str,
    start_time: float | None = None,
    end_time: float | None = None,
    generation_parameters: dict[str, Any] | None = None,
    samples: Sequence[dict[str, Any]] | None = None,
) -> Path:
    """Write metrics.json and, where there are samples, samples.jsonl, in the upstream format. Returns the first's path."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = end_time or time.time()
    seconds = ended - (start_time or ended)
    report = {
        "config_general": {
            "model_name": model_name,
            "total_evaluation_time_seconds": str(seconds),
            "generation_parameters": generation_parameters or {},
        },
        "results": {f"atropos|{task_name}|0": metrics, "all": metrics},
    }
    path = folder / "metrics.json"
    _replace(path, json.dumps(report, indent=2, default=plain) + "\n")
    if samples:
        lines = (json.dumps(sample, ensure_ascii=False, default=plain) + "\n" for sample in samples)
        _replace(folder / "samples.jsonl", "".join(lines))
    return path


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """A small table on stdout."""
    display_metrics_table(title, metrics)


def _replace(path: Path, text: str) -> None:
    # Whoever watches the file sees the old result or the new one, never half of one.
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
