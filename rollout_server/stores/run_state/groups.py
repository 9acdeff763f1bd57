"""Groups that come in: queued, known already, or retired on arrival."""

from __future__ import annotations

from collections.abc import Sequence

from atroposlib.errors import GroupFormatError, QueueFullError, UnknownEnvError
from atroposlib.wire.columns import Blob
from atroposlib.wire.models import GroupResult
from rollout_server.admission import fits
from rollout_server.stores.changes import GroupRow, RunRow
from rollout_server.stores.run_state.queue import StoredGroup
from rollout_server.stores.run_state.state import RunState


def append(state: RunState, blobs: Sequence[Blob], *, known: set[str], is_strict: bool) -> list[GroupResult]:
    """See Store.append.

    Args:
        known: those of the group_ids that the index already holds.
    """
    run = state.require_run() if is_strict else state.run
    if is_strict and run is not None:
        _refuse_unknown_envs(state, blobs)
        _refuse_too_long(blobs, run.request.max_token_len)
    _refuse_too_much(state, blobs)
    return [_append_one(state, run, blob, known) for blob in blobs]


def _refuse_unknown_envs(state: RunState, blobs: Sequence[Blob]) -> None:
    for blob in blobs:
        if blob.header.env_id not in state.envs:
            raise UnknownEnvError(
                f"group {blob.header.group_id!r} names environment {blob.header.env_id}, which is not registered; POST /v1/envs first"
            )


def _refuse_too_long(blobs: Sequence[Blob], limit: int) -> None:
    for blob in blobs:
        if 0 < limit < blob.longest_sequence:
            raise GroupFormatError(
                f"group {blob.header.group_id!r} holds a sequence of {blob.longest_sequence} tokens, the trainer takes at most"
                f" max_token_len={limit}; lower the environment's max_token_length"
            )


def _refuse_too_much(state: RunState, blobs: Sequence[Blob]) -> None:
    n_bytes = sum(len(blob.data) for blob in blobs)
    if state.queue.n_bytes + n_bytes > state.limits.max_queued_bytes:
        raise QueueFullError(
            f"{state.queue.n_bytes} bytes wait for the trainer, the limit is {state.limits.max_queued_bytes}; try again later"
        )


def _append_one(state: RunState, run: RunRow | None, blob: Blob, known: set[str]) -> GroupResult:
    header = blob.header
    if header.group_id in known or header.group_id in state.unsaved_ids:
        state.count("groups_duplicate")
        return GroupResult(group_id=header.group_id, status="duplicate")
    on_time = header.ticket is not None and state.drop_ticket(header.ticket)
    reason = _why_not(state, run, blob, on_time=on_time)
    order_version = header.oldest_version
    if order_version is None:
        order_version = max(run.policy_version, 0) if run is not None else 0
    place = state.allocate(len(blob.data)) if reason is None else None
    row = GroupRow(
        state.next_key, header.group_id, header.env_id, blob.n_sequences, blob.n_tokens, header.oldest_version,
        order_version, place, retired=reason,
    )  # fmt: skip
    state.next_key += 1
    state.changes.groups.append(row)
    state.unsaved_ids.add(header.group_id)
    state.capacity_changed = state.queue_changed = True
    env = state.envs.get(header.env_id)
    if env is not None:
        env.last_seen, env.lacking_since = state.clock(), None
    if place is None:
        state.count(f"retired:{reason}")
        return GroupResult(group_id=header.group_id, status="retired", reason=reason)
    state.changes.payloads.append((place, blob.data))
    state.latest = StoredGroup.of(row, place)
    state.queue.add(state.latest)
    state.count("groups_accepted")
    state.count(f"env:{header.env_id}")
    return GroupResult(group_id=header.group_id, status="accepted")


def _why_not(state: RunState, run: RunRow | None, blob: Blob, *, on_time: bool) -> str | None:
    """Why a group can no longer be trained within the bound; None when it can."""
    header = blob.header
    if header.run_id is not None and (run is None or header.run_id != run.run_id):
        return "other_run"
    version = header.oldest_version
    if version is None or run is None:
        return None
    bound = state.bound()
    # A group whose ticket was void has lost its place; it may still find a free one.
    is_in_time = on_time or fits(bound, state.pending(), version=version, sequences=blob.n_sequences)
    if is_in_time and not bound.is_stale(version):
        return None
    if run.request.late_policy == "requeue":
        return "requeue"
    return "stale" if bound.is_stale(version) else "late"
