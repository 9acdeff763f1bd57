"""Merges the trajectories of one item into a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from atroposlib.type_definitions import ScoredDataGroup, ScoredDataItem

_PER_SEQUENCE = (
    "advantages",
    "ref_logprobs",
    "messages",
    "overrides",
    "images",
    "inference_logprobs",
    "policy_versions",
    "distill_token_ids",
    "distill_logprobs",
)


def merge_trajectories(items: Sequence[ScoredDataItem]) -> ScoredDataGroup:
    """One group out of single trajectories. An optional column is there only when every trajectory has it.

    Raises:
        ValueError: a result is not a trajectory.
    """
    for item in items:
        if not isinstance(item, dict):
            raise ValueError(
                f"collect_trajectory must return (ScoredDataItem, backlog); the first element is {type(item).__name__}"
            )
    group: dict[str, Any] = {
        "tokens": [item["tokens"] for item in items],
        "masks": [item["masks"] for item in items],
        "scores": [item["scores"] for item in items],
    }
    for name in _PER_SEQUENCE:
        values = [item.get(name) for item in items]
        if all(value is not None for value in values):
            group[name] = values
    if all(item.get("finish_reason") for item in items):
        group["finish_reasons"] = [item.get("finish_reason") for item in items]
    group["generation_params"] = next((params for item in items if (params := item.get("generation_params"))), None)
    group["group_overrides"] = {
        key: value for item in items for key, value in (item.get("group_overrides") or {}).items()
    } or None
    return cast(ScoredDataGroup, group)
