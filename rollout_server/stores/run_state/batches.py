"""Batches as the trainer handles them: leased, given back, acknowledged, committed."""

from __future__ import annotations

from dataclasses import replace

from atroposlib.errors import ProtocolError, StepError
from atroposlib.wire.models import NackRequest, NackResult
from rollout_server.stores.base import NotReady
from rollout_server.stores.changes import RunRow
from rollout_server.stores.run_state.forming import count_trained, form_next
from rollout_server.stores.run_state.queue import StoredGroup
from rollout_server.stores.run_state.runs import publish
from rollout_server.stores.run_state.state import RunState


def lease(state: RunState, step: int, session: int) -> list[StoredGroup] | NotReady:
    """See Store.lease; the whole batch."""
    run = state.require_trainer(session)
    _check_leasable(run, step)
    state.trainer_waits_for = form_next(state, run) if step == run.next_step else None
    if state.trainer_waits_for is not None:
        return NotReady(state.trainer_waits_for)
    return state.batches.get(step, [])


def _check_leasable(run: RunRow, step: int) -> None:
    if step < run.committed or step > run.next_step:
        raise StepError(
            f"step {step} cannot be leased: steps {run.committed} to {run.next_step} can (committed, next to be formed)"
        )
    if step == run.next_step and step >= run.request.num_steps:
        raise StepError(f"step {step} cannot be leased: the run has num_steps={run.request.num_steps}")


def nack(state: RunState, step: int, request: NackRequest) -> NackResult:
    """See Store.nack."""
    run = state.require_trainer(request.session)
    if not run.acknowledged <= step < run.next_step:
        raise StepError(
            f"the batch of step {step} cannot be given back: formed and not acknowledged are steps {run.acknowledged}"
            f" to {run.next_step - 1}"
        )
    steps = range(step, run.next_step)
    dissolved = [group for s in steps for group in state.batches.get(s, [])]
    retired = set(request.retire)
    unknown = retired - {group.group_id for group in dissolved}
    if unknown:
        raise ProtocolError(f"retire names {sorted(unknown)[0]!r}, which is in no batch from step {step} on")

    for s in steps:
        state.batches.pop(s, None)
    for group in dissolved:
        count_trained(state, group, -1)
        if group.group_id in retired:
            state.retire(group, f"nack_{request.reason}")
        else:
            state.changes.moved[group.key] = (None, None)
            state.queue.add(group)
    state.set_run(replace(run, next_step=step))
    state.capacity_changed = state.queue_changed = True
    result = NackResult(requeued=len(dissolved) - len(retired), retired=len(retired))
    state.note_event(
        "batch_nacked", f"batch of step {step} given back: {request.reason}; {result.retired} groups retired"
    )
    return result


def ack(state: RunState, step: int, session: int, policy_version: int | None) -> None:
    """See Store.ack."""
    run = state.require_trainer(session)
    if step >= run.next_step:
        raise StepError(
            f"step {step} cannot be acknowledged: its batch was never handed out (next is {run.next_step}); lease it first"
        )
    run = publish(state, run, policy_version)
    if step >= run.acknowledged:
        state.set_run(replace(run, acknowledged=step + 1))
        state.note_event("step_acknowledged", f"step {step} is done")
    state.capacity_changed = True


def commit(state: RunState, step: int, session: int) -> None:
    """See Store.commit."""
    run = state.require_trainer(session)
    if step > run.acknowledged:
        raise StepError(
            f"commit of step {step} comes before its acknowledgement (steps acknowledged: {run.acknowledged}); acknowledge it first"
        )
    if step > run.committed:
        state.set_run(replace(run, committed=step))
        for s in [s for s in state.batches if s < step]:
            state.changes.released += [group.place for group in state.batches.pop(s)]
        state.note_event("committed", f"a checkpoint holds the weights after {step} steps")
