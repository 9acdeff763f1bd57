"""Whether the next batch can leave, and with which groups: staleness (admission.py) and composition (batching.py) together. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rollout_server.admission import Bound, must_leave, must_wait_for, overfull_version
from rollout_server.batching import EnvShare, QueuedGroup, Wait, plan_batch

G = TypeVar("G", bound=QueuedGroup)


@dataclass(frozen=True)
class Scene(Generic[G]):
    """The run at the moment of planning."""

    bound: Bound
    queued: Mapping[int, int]
    """Sequences in the queue, by oldest policy version; groups of unknown version are not in it."""
    pending: Mapping[int, int]
    """Those and the sequences in flight."""
    flight: Mapping[int, int]
    """Groups in flight, by policy version."""
    window: Sequence[G]
    """The head of the queue, as plan_batch wants it."""
    shares: Mapping[int, EnvShare]
    """By env_id."""
    is_patient: bool
    """Groups in flight are waited for; otherwise the batch leaves without them."""


@dataclass(frozen=True)
class Plan(Generic[G]):
    """The next batch."""

    groups: list[G]
    """In queue order."""
    overfull: int | None
    """The policy version up to which more stays behind than can be trained in time; None when all that stays can."""
    strands: bool
    """Whether groups in flight are among those: they must be given up."""


def plan_next(scene: Scene[G]) -> Plan[G] | Wait:
    """The groups of the next batch, or what it waits for."""
    if scene.is_patient:
        version = must_wait_for(scene.bound, scene.pending, scene.queued)
        if version is not None and _strands(scene, version):
            return _stragglers(scene, version)
    groups = plan_batch(
        scene.window, scene.bound.batch_size, must_leave=must_leave(scene.bound, scene.pending), shares=scene.shares
    )
    if isinstance(groups, Wait):
        return groups
    version = overfull_without(scene.bound, scene.pending, groups)
    strands = version is not None and _strands(scene, version)
    if version is not None and strands and scene.is_patient:
        return _stragglers(scene, version)
    return Plan(groups, version, strands)


def overfull_without(bound: Bound, pending: Mapping[int, int], batch: Sequence[QueuedGroup]) -> int | None:
    """The version up to which too much stays behind once this batch has left; None when all that stays can be trained in time."""
    stays = Counter(pending)
    for group in batch:
        if group.oldest_version is not None:
            stays[group.oldest_version] -= group.n_sequences
    return overfull_version(bound.after_next_batch(), +stays)


def _strands(scene: Scene[G], version: int) -> bool:
    """Whether somebody is there to be waited for. Too much in the queue alone, as after a trainer that lowered its bound, goes stale."""
    return any(other <= version for other in scene.flight)


def _stragglers(scene: Scene[G], version: int) -> Wait:
    older = sum(groups for other, groups in scene.flight.items() if other <= version)
    return Wait(f"{older} older groups in flight that step {scene.bound.next_step} must leave room for (max_staleness)")
