"""A group out of single trajectories: collected side by side, tried again where infrastructure failed, merged."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, cast

from atroposlib.envs.gathering import all_or_none
from atroposlib.envs.serving.sending import split_result
from atroposlib.errors import RolloutError, infrastructure_error
from atroposlib.type_definitions import Item, ScoredDataGroup, ScoredDataItem

log = logging.getLogger(__name__)

TRAJECTORY_TRIES = 3

Collect: TypeAlias = Callable[[Item], Awaitable[Any]]
"""An environment's collect_trajectory."""

_PER_SEQUENCE = (
    "advantages",
    "ref_logprobs",
    "messages",
    "images",
    "inference_logprobs",
    "policy_versions",
    "distill_token_ids",
    "distill_logprobs",
)


async def collect_group(
    collect: Collect, item: Item, *, group_size: int, min_valid: int
) -> tuple[ScoredDataGroup | None, list[Item]]:
    """group_size trajectories of one item, merged, and the items to roll out later.

    A member that is None, or whose infrastructure fails for good, is left out; None when no member is left.

    Args:
        min_valid: members that must be left when infrastructure failed.
    Raises:
        RolloutError: fewer are left.
        ValueError: a result is not a trajectory.
    """
    results = await all_or_none(_collect_with_retries(collect, item) for _ in range(group_size))
    valid = [result for result in results if not isinstance(result, RolloutError)]
    members = [trajectory for trajectory, _ in valid if trajectory is not None]
    failures = [result for result in results if isinstance(result, RolloutError)]
    if failures and len(members) < min_valid:
        raise RolloutError(
            f"{len(members)} of {group_size} trajectories succeeded, {min_valid} are needed; last failure: {failures[-1]}"
        ) from failures[-1]
    backlog = [later for _, more in valid for later in more]
    return (merge_trajectories(members) if members else None), backlog


async def _collect_with_retries(collect: Collect, item: Item) -> tuple[Any, list[Item]] | RolloutError:
    for attempt in range(1, TRAJECTORY_TRIES + 1):
        try:
            return split_result(await collect(item))
        except Exception as error:
            failure = infrastructure_error(error)
            if failure is None:
                raise
            log.warning("trajectory failed, attempt %d of %d: %s", attempt, TRAJECTORY_TRIES, failure)
            last = failure
    return last


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
    if any(item.get("overrides") for item in items):
        group["overrides"] = [item.get("overrides") or {} for item in items]
    if all(item.get("finish_reason") for item in items):
        group["finish_reasons"] = [item.get("finish_reason") for item in items]
    group["generation_params"] = next((params for item in items if (params := item.get("generation_params"))), None)
    group["group_overrides"] = {
        key: value for item in items for key, value in (item.get("group_overrides") or {}).items()
    } or None
    return cast(ScoredDataGroup, group)
