"""The counters of a run, as clients see them. The cost depends on the environments, not on the queue."""

from __future__ import annotations

from collections.abc import Mapping

from atroposlib.wire.models import EnvStatus, InferenceServerStatus, Status
from rollout_server.stores.run_state.queue import EnvCount
from rollout_server.stores.run_state.state import EnvState, RunState


def status_of(state: RunState) -> Status:
    """See Store.status."""
    queue, run, now = state.queue, state.run, state.clock()
    in_flight = state.flight.sequences
    facts = Status(
        queued_groups=queue.groups,
        queued_sequences=queue.sequences,
        queued_bytes=queue.n_bytes,
        largest_queued_group=max(queue.sizes, default=0),
        group_sizes_queued=sorted(queue.sizes)[:64],
        tickets_outstanding=len(state.flight.tickets),
        sequences_in_flight=in_flight,
        groups_accepted=state.counters["groups_accepted"],
        groups_duplicate=state.counters["groups_duplicate"],
        groups_retired=_with_prefix(state.counters, "retired:"),
        tickets_returned=_with_prefix(state.counters, "ticket:"),
        envs=[_env_status(state, env, now) for env in state.envs.values()],
        inference_servers=[
            InferenceServerStatus(server=server, last_seen_s=now - seen) for server, seen in state.servers.values()
        ],
    )
    if run is None:
        return facts
    bound = state.bound()
    return facts.model_copy(
        update={
            "run_name": run.request.run_name,
            "run_id": run.run_id,
            "batch_size": run.request.batch_size,
            "max_staleness": run.request.max_staleness,
            "late_policy": run.request.late_policy,
            "step": run.acknowledged,
            "formed_steps": run.next_step,
            "num_steps": run.request.num_steps,
            "policy_version": run.policy_version,
            "committed_step": run.committed,
            "admitted_sequences": run.next_step * bound.batch_size + queue.sequences + in_flight,
            "capacity_sequences": max(0, bound.batch_size * (run.policy_version + bound.max_staleness + 1))
            if run.policy_version >= 0
            else 0,
            "trainer_last_seen_s": None if state.trainer_last_seen is None else now - state.trainer_last_seen,
            "trainer_waits_for": state.trainer_waits_for,
        }
    )


def _env_status(state: RunState, env: EnvState, now: float) -> EnvStatus:
    request, env_id = env.row.request, env.row.env_id
    count = state.queue.by_env.get(env_id) or EnvCount()
    flight = state.flight.by_env.get(env_id) or EnvCount()
    return EnvStatus(
        env_id=env_id,
        name=request.name,
        group_size=request.group_size,
        max_token_len=request.max_token_len,
        weight=request.weight,
        min_batch_allocation=request.min_batch_allocation,
        is_connected=env.row.is_connected,
        last_seen_s=now - env.last_seen,
        tickets=flight.groups,
        queued_groups=count.groups,
        queued_sequences=count.sequences,
        groups_accepted=state.counters[f"env:{env_id}"],
        trained_tokens=state.counters[f"trained_tokens:{env_id}"],
    )


def _with_prefix(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): value for name, value in counters.items() if name.startswith(prefix)}
