"""The run and its trainer: opening, taking over, publishing a policy version."""

from __future__ import annotations

import uuid
from dataclasses import replace

from atroposlib.errors import ConfigError, StepError
from atroposlib.wire.models import RunInfo, RunRequest
from rollout_server.stores.changes import RunRow
from rollout_server.stores.run_state.state import RunState


def open_run(state: RunState, request: RunRequest) -> RunInfo:
    """See Store.open_run; another run's state must have been put away before."""
    run = state.run
    if run is not None:
        _check_resume(run, request)
    run = state.set_run(_first_session(request) if run is None else _next_session(run, request))
    state.trainer_last_seen = state.clock()
    state.capacity_changed = state.queue_changed = True
    state.note_event(
        "run_opened", f"run {request.run_name}: trainer session {run.session}, {run.acknowledged} steps done"
    )
    return run.info()


def _check_resume(run: RunRow, request: RunRequest) -> None:
    if request.start_step is not None and request.start_step < run.committed:
        raise StepError(
            f"run {request.run_name!r} keeps the batches from step {run.committed} on; a trainer at step {request.start_step}"
            " cannot resume here: resume from the newest checkpoint, or choose a new run_name"
        )
    if request.batch_size != run.request.batch_size and run.next_step > run.committed:
        raise ConfigError(
            f"run {request.run_name!r} has batches of {run.request.batch_size} to replay; batch_size={request.batch_size}"
            " does not fit: keep it, or choose a new run_name"
        )


def _first_session(request: RunRequest) -> RunRow:
    start = request.start_step or 0
    return RunRow(uuid.uuid4().hex, request, 1, next_step=start, acknowledged=start, committed=start)


def _next_session(run: RunRow, request: RunRequest) -> RunRow:
    # A server that lost its folder starts at the trainer's step.
    next_step = max(run.next_step, request.start_step or 0)
    return replace(run, request=request, session=run.session + 1, next_step=next_step)


def set_policy(state: RunState, policy_version: int, session: int) -> None:
    """See Store.set_policy."""
    publish(state, state.require_trainer(session), policy_version)


def publish(state: RunState, run: RunRow, policy_version: int | None) -> RunRow:
    """Note that the inference servers run this version; None and older ones change nothing. Returns the run as it is then."""
    if policy_version is None or policy_version <= run.policy_version:
        return run
    state.capacity_changed = True
    state.note_event("policy_published", f"the inference servers run policy version {policy_version}")
    return state.set_run(replace(run, policy_version=policy_version))
