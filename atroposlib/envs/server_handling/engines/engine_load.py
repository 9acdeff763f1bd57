"""How loaded an engine says it is: its Prometheus gauges, read into three numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
CACHE_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+\d+)?$", re.ASCII)


@dataclass(frozen=True)
class EngineLoad:
    """One moment of an engine."""

    running: int
    """Requests that are being computed."""
    waiting: int
    """Requests in the engine's queue."""
    kv_cache_usage: float
    """Share of the cache in use, 0 to 1: of the fullest replica where there are several."""


def parse_engine_load(metrics_text: str) -> EngineLoad | None:
    """Read a /metrics page of vLLM or SGLang; requests are summed over replicas. None: it is no page of theirs."""
    samples: dict[str, list[tuple[str, float]]] = {}
    for name, labels, value in _samples(metrics_text):
        samples.setdefault(name, []).append((labels, value))
    running = _first(samples, RUNNING)
    if running is None:
        return None
    return EngineLoad(
        running=round(_total(running)),
        waiting=round(_total(_first(samples, WAITING) or [])),
        kv_cache_usage=max((value for _, value in _first(samples, CACHE_USAGE) or []), default=0.0),
    )


def _samples(metrics_text: str) -> Iterator[tuple[str, str, float]]:
    for line in metrics_text.splitlines():
        # Histograms make most of such a page: look closer only at what is wanted.
        if line.startswith(("vllm:", "sglang:")) and (match := _SAMPLE.match(line.strip())):
            try:
                value = float(match["value"])
            except ValueError:
                continue
            if 0 <= value < math.inf:
                yield match["name"], match["labels"] or "", value


def _first(samples: dict[str, list[tuple[str, float]]], names: Sequence[str]) -> list[tuple[str, float]] | None:
    return next((samples[name] for name in names if name in samples), None)


def _total(samples: list[tuple[str, float]]) -> float:
    # SGLang repeats its counts for each request priority, beside a total whose priority is empty.
    totals = [value for labels, value in samples if 'priority=""' in labels]
    return sum(totals or [value for _, value in samples])
