"""Evaluation: many items at once with a progress bar, and the files that a result is kept in."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def map_items(
    items: Sequence[T], evaluate: Callable[[T], Awaitable[R]], *, concurrency: int = 64, description: str = "evaluating"
) -> list[R]:
    """Evaluate every item, some at a time; results in the order of the items. Shows a progress bar on a terminal.

    Raises:
        ExceptionGroup: an item failed. A partial evaluation is not a result.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    slots = asyncio.Semaphore(concurrency)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(description, total=len(items))

        async def one(item: T) -> R:
            async with slots:
                result = await evaluate(item)
            progress.advance(bar)
            return result

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(item)) for item in items]
    return [task.result() for task in running]


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
    now = time.time()
    seconds = (end_time or now) - (start_time or now)
    report = {
        "config_general": {
            "model_name": model_name,
            "total_evaluation_time_seconds": str(seconds),
            "generation_parameters": generation_parameters or {},
        },
        "results": {f"atropos|{task_name}|0": metrics, "all": metrics},
    }
    path = folder / "metrics.json"
    # Whoever watches the file sees the old result or the new one, never half of one.
    draft = folder / "metrics.json.tmp"
    draft.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    draft.replace(path)
    if samples:
        lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    return path


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """A small table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
