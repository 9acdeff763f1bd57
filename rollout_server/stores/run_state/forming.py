"""Binding queued groups to the next step: planning.py decides, here the run is put before it and the plan carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from rollout_server.admission import Bound
from rollout_server.batching import SEARCH_WINDOW, EnvShare, Wait
from rollout_server.planning import Scene, overfull_without, plan_next
from rollout_server.stores.changes import RunRow
from rollout_server.stores.run_state.queue import StoredGroup, batch_order, sequences_of
from rollout_server.stores.run_state.state import RunState


def form_next(state: RunState, run: RunRow) -> str | None:
    """Bind groups to the next step; says what is missing when there is no batch."""
    bound = state.bound()
    _retire_stale(state, bound)
    if state.queue.sequences < bound.batch_size:
        return (
            f"{bound.batch_size - state.queue.sequences} more sequences for step {bound.next_step}"
            f" ({state.queue.sequences} of {bound.batch_size} queued, {len(state.flight.tickets)} groups in flight)"
        )
    plan = plan_next(_scene(state, bound, is_patient=run.request.late_policy == "wait"))
    if isinstance(plan, Wait):
        if plan.is_for_minimum:
            _note_who_lacks(state)
        return plan.waiting_for
    if plan.strands:
        _give_up(state, bound, plan.groups, run.request.late_policy)
    _bind(state, run, plan.groups)
    return None


def _retire_stale(state: RunState, bound: Bound) -> None:
    stale = state.queue.stale(bound)
    for group in stale:
        state.queue.remove(group)
        state.retire(group, "stale")
    if stale:
        state.note_event("groups_retired", f"{len(stale)} groups went stale in the queue")


def _scene(state: RunState, bound: Bound, *, is_patient: bool) -> Scene[StoredGroup]:
    return Scene(
        bound=bound,
        queued=state.queue.by_version,
        pending=state.pending(),
        flight=state.flight.groups_by_version,
        window=list(islice(state.queue.in_order(), bound.batch_size + SEARCH_WINDOW)),
        shares=_shares(state),
        is_patient=is_patient,
    )


def _shares(state: RunState) -> dict[int, EnvShare]:
    now = state.clock()
    return {
        env_id: EnvShare(
            weight=env.row.request.weight,
            minimum=env.row.request.min_batch_allocation or 0.0,
            trained_tokens=state.counters[f"trained_tokens:{env_id}"],
            is_live=state.is_live(env)
            and (env.lacking_since is None or now - env.lacking_since < state.limits.allocation_wait_s),
        )
        for env_id, env in state.envs.items()
    }


def _note_who_lacks(state: RunState) -> None:
    """From now on the batch's wait for an environment's minimum counts."""
    for env_id, env in state.envs.items():
        has_nothing = not sequences_of(state.queue.by_env, env_id)
        if env.row.request.min_batch_allocation and has_nothing and env.lacking_since is None:
            env.lacking_since = state.clock()


def _give_up(state: RunState, bound: Bound, batch: Sequence[StoredGroup], reason: str) -> None:
    """Void the oldest groups in flight until what stays behind the batch can be trained in time."""
    for ticket in state.flight.oldest_first():
        version = overfull_without(bound, state.pending(), batch)
        if version is None or all(other > version for other in state.flight.groups_by_version):
            break
        state.void_tickets([ticket], reason=reason)


def _bind(state: RunState, run: RunRow, groups: Sequence[StoredGroup]) -> None:
    step = run.next_step
    for group in groups:
        state.queue.remove(group)
        state.changes.moved[group.key] = (step, None)
        count_trained(state, group, 1)
    state.batches[step] = sorted(groups, key=batch_order)
    state.set_run(replace(run, next_step=step + 1))
    state.capacity_changed = True
    state.note_event(
        "batch_formed", f"batch of step {step}: {len(groups)} groups, {sum(group.n_tokens for group in groups)} tokens"
    )


def count_trained(state: RunState, group: StoredGroup, sign: int) -> None:
    """Add a group to what its environment has had trained, or with -1 take it back."""
    state.count(f"trained_tokens:{group.env_id}", sign * group.n_tokens)
    state.count(f"trained_sequences:{group.env_id}", sign * group.n_sequences)
