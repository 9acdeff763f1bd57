"""Where the run stands, in the six figures that environments read from status_dict."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from atroposlib.wire.models import EnvStatus, Status

StatusDict: TypeAlias = dict[str, int | float]

MIN_WEIGHT = 0.01


def status_dict(status: Status, *, env_id: int, group_size: int) -> StatusDict:
    """The figures under their upstream names. Queue sizes are groups of this environment's size."""
    present = [env for env in status.envs if env.is_connected]
    own = next((env for env in status.envs if env.env_id == env_id), None)
    promised = sum(env.min_batch_allocation or 0.0 for env in present)
    return {
        "current_step": status.step,
        "queue_size": status.queued_sequences // group_size,
        "unallocated_fraction": 1.0 - min(1.0, promised),
        "self_queue_size": own.queued_sequences // group_size if own else 0,
        "max_group_size": max(1, status.largest_queued_group),
        "env_weight": _share(own, present),
    }


def derived_batch_size(batch_size: int, figures: StatusDict | None, minimum: float | None) -> int:
    """Sequences of a batch that this environment may fill: what nobody is promised, and its own promise."""
    if figures is None or batch_size == -1:
        return batch_size
    return int(batch_size * (figures["unallocated_fraction"] + (minimum or 0.0)))


def offpolicy_limit(max_batches: int, batch_size: int, group_size: int, figures: StatusDict | None) -> int | None:
    """Groups that may be in flight so that, with those queued, they fill no more than max_batches; None: no bound."""
    if max_batches <= 0 or batch_size <= 0:
        return None
    queued = int(figures["queue_size"]) if figures else 0
    return max(0, max_batches * batch_size // group_size - queued)


def _share(own: EnvStatus | None, present: list[EnvStatus]) -> float:
    """The environment's part of the work, by sequence length and weight."""
    total = sum(env.max_token_len * max(0.0, env.weight) for env in present)
    if own is None:
        return 1.0
    return max(MIN_WEIGHT, own.max_token_len * max(0.0, own.weight) / total) if total > 0 else MIN_WEIGHT
