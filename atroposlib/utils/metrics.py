"""Summaries of lists of numbers for logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def get_std_min_max_avg(name: str, data: Sequence[float], metrics_dict: dict[str, Any]) -> dict[str, Any]:
    """Add `<name>_mean`, `_std` (over the whole population), `_max` and `_min` to metrics_dict, and return it.

    Raises:
        ValueError: data is empty.
    """
    # numpy takes a tenth of a second to import, and whoever imports this module may not need it.
    import numpy as np

    if len(data) == 0:
        raise ValueError(f"{name}: there is no mean of nothing; leave the metric out where there is no data")
    values = np.asarray(data, dtype=float)
    metrics_dict[f"{name}_mean"] = float(values.mean())
    metrics_dict[f"{name}_std"] = float(values.std())
    metrics_dict[f"{name}_max"] = float(values.max())
    metrics_dict[f"{name}_min"] = float(values.min())
    return metrics_dict
