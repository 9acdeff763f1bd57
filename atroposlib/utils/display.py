"""Metrics of an evaluation as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def display_metrics_table(
    task_name: str, metrics: Mapping[str, Any], start_time: float | None = None, end_time: float | None = None
) -> None:
    """Print metrics_table to stdout."""
    print(metrics_table(task_name, metrics, start_time, end_time))


def metrics_table(
    task_name: str, metrics: Mapping[str, Any], start_time: float | None = None, end_time: float | None = None
) -> str:
    """A Markdown table, one line a metric.

    Args:
        start_time, end_time: seconds since the epoch; the time between them is told where both are there.
    """
    names = [str(name).replace("|", "\\|") for name in metrics]
    values = [_number(value) for value in metrics.values()]
    wide = max([len("metric"), *map(len, names)])
    tall = max([len("value"), *map(len, values)])
    lines = [f"## {task_name}", "", f"| {'metric':<{wide}} | {'value':>{tall}} |", f"|:{'-' * wide}-|-{'-' * tall}:|"]
    lines += [f"| {name:<{wide}} | {value:>{tall}} |" for name, value in zip(names, values, strict=True)]
    if start_time is not None and end_time is not None:
        lines += ["", f"{end_time - start_time:.1f} s"]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4f}"
