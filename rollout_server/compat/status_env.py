"""The answer of /status-env: what an old environment's scheduler reckons with. Counters only, no queue is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atroposlib.wire.models import EnvStatus, Status

MIN_WEIGHT = 0.01
"""Smallest env_weight that is answered. A registered weight that is not above it counts as none in the total."""


@dataclass(frozen=True)
class EnvFigures:
    """One environment."""

    group_size: int
    """Sequences: as registered, or of the largest group it sent."""
    max_token_len: int
    weight: float
    minimum: float | None
    """Share of each batch that it is promised."""
    queued_sequences: int
    is_present: bool
    """Connected, and heard of lately."""


@dataclass(frozen=True)
class QueueFigures:
    """What concerns all environments."""

    step: int
    """Batches handed out."""
    batch_size: int
    queued_groups: int
    queued_sequences: int
    largest_group: int
    """Sequences of the largest queued group; 0 when none is queued."""


def env_status(env_id: int, envs: Mapping[int, EnvFigures], queue: QueueFigures) -> dict[str, int | float]:
    """The six figures for one environment.

    One that is not known is told the plain state of the run with full weight, so that it goes on: its groups are taken.

    Args:
        env_id: who asks.
        envs: every registered environment. Queued sequences of others count together as one more.
    """
    largest = max(1, queue.largest_group)
    own = envs.get(env_id)
    return {
        "current_step": queue.step,
        "queue_size": queue.queued_groups if own is None else _queue_size(env_id, own, envs, queue, largest),
        "unallocated_fraction": 1.0 - min(1.0, sum(env.minimum or 0.0 for env in envs.values() if env.is_present)),
        "self_queue_size": 0 if own is None else own.queued_sequences // own.group_size,
        "max_group_size": largest,
        "env_weight": 1.0 if own is None else _weight(own, envs),
    }


def _queue_size(env_id: int, own: EnvFigures, envs: Mapping[int, EnvFigures], queue: QueueFigures, largest: int) -> int:
    """In groups of the asking environment: its own, and of the others what they have beyond their minimum."""
    if largest == 1:
        return own.queued_sequences // own.group_size
    unregistered = queue.queued_sequences - sum(env.queued_sequences for env in envs.values())
    others = [(unregistered, 0.0)]
    others += [(env.queued_sequences, env.minimum or 0.0) for other, env in envs.items() if other != env_id]
    beyond = sum(
        max(0, -(-sequences // largest) * largest - int(queue.batch_size * minimum)) for sequences, minimum in others
    )
    return (own.queued_sequences + beyond) // own.group_size


def _weight(own: EnvFigures, envs: Mapping[int, EnvFigures]) -> float:
    """The environment's part of the work, by sequence length and weight."""
    total = sum(_work(env) for env in envs.values() if env.is_present)
    return max(MIN_WEIGHT, _work(own) / total) if total > 0 else MIN_WEIGHT


def _work(env: EnvFigures) -> float:
    return env.max_token_len * env.weight if env.weight > MIN_WEIGHT else 0.0


def queue_figures(status: Status) -> QueueFigures:
    """Of the store's counters."""
    return QueueFigures(
        step=status.formed_steps,
        batch_size=status.batch_size,
        queued_groups=status.queued_groups,
        queued_sequences=status.queued_sequences,
        largest_group=status.largest_queued_group,
    )


def env_figures(
    envs: Sequence[EnvStatus], largest_groups: Mapping[int, int], *, env_timeout_s: float
) -> dict[int, EnvFigures]:
    """Of the store's counters, by env_id.

    Args:
        largest_groups: sequences of the largest group that each environment sent.
        env_timeout_s: one that is silent for longer is not present.
    """
    return {
        env.env_id: EnvFigures(
            group_size=max(env.group_size, largest_groups.get(env.env_id, 0)),
            max_token_len=env.max_token_len,
            weight=env.weight,
            minimum=env.min_batch_allocation,
            queued_sequences=env.queued_sequences,
            is_present=env.is_connected and env.last_seen_s <= env_timeout_s,
        )
        for env in envs
    }
