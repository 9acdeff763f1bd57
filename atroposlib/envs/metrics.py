"""Metrics of the author's side: lengths of completions, durations of groups, under their upstream names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NEARLY_FULL = 0.95


def length_metrics(lengths: Sequence[int], *, max_token_len: int) -> dict[str, float]:
    """Of completion lengths in tokens; none where there are no lengths.

    `_p95` has upstream's meaning, which is no percentile: the share of lengths above 95 % of max_token_len. The
    percentile is `_percentile_95_tokens`.
    """
    if not lengths:
        return {}
    import numpy as np

    values = np.asarray(lengths, dtype=np.float64)
    name = "train/completion_lengths"
    return {
        name: float(values.mean()),
        f"{name}_std": float(values.std()),
        f"{name}_max": float(values.max()),
        f"{name}_min": float(values.min()),
        f"{name}_p95": float((values > NEARLY_FULL * max_token_len).mean()) if max_token_len > 0 else 0.0,
        f"{name}_percentile_95_tokens": float(np.percentile(values, 95)),
    }


def timing_metrics(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """`train_perf/<name>_{mean,std,max,min}` of every name with more than one sample."""
    import numpy as np

    metrics: dict[str, float] = {}
    for name, values in samples.items():
        if len(values) < 2:
            continue
        row = np.asarray(values, dtype=np.float64)
        figures = {"mean": row.mean(), "std": row.std(), "max": row.max(), "min": row.min()}
        metrics |= {f"train_perf/{name}_{figure}": float(value) for figure, value in figures.items()}
    return metrics


def finish_reason_shares(reasons: Mapping[str, int]) -> dict[str, float]:
    """`train/finish_reason_<reason>_share` of sequences; empty where nobody said why a sequence ended."""
    total = sum(reasons.values())
    return {f"train/finish_reason_{reason}_share": count / total for reason, count in reasons.items() if total}


async def server_metrics(servers: Iterable[Any]) -> dict[str, Any]:
    """`server/server_<i>_*` of all servers, for those whose client keeps such figures."""
    metrics: dict[str, Any] = {}
    for index, server in enumerate(servers):
        report = getattr(server, "wandb_metrics", None)
        if report is not None:
            metrics = await report(metrics, f"server_{index}") or metrics
    return metrics


def with_prefix(prefix: str | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """All names as `<prefix>_<name>`; unchanged without a prefix."""
    return {f"{prefix}_{name}": value for name, value in metrics.items()} if prefix else dict(metrics)


def completion_lengths(masks: Iterable[Sequence[int]], *, masked: int) -> list[int]:
    """Trained tokens of each sequence."""
    return [len(labels) - (labels if hasattr(labels, "count") else list(labels)).count(masked) for labels in masks]
