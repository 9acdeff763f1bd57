"""Tickets: which groups may start, and how long they may take."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from atroposlib.wire.models import Ticket, TicketGrant, TicketRequest, TicketUpdate
from rollout_server.admission import Claim, fits, may_take
from rollout_server.stores.changes import RunRow, TicketRow
from rollout_server.stores.run_state.in_flight import TicketState
from rollout_server.stores.run_state.queue import sequences_of
from rollout_server.stores.run_state.state import EnvState, RunState


def grant(state: RunState, request: TicketRequest) -> TicketGrant:
    """See Store.grant_tickets."""
    run = state.require_run()
    env = state.require_env(request.env_id, request.session)
    is_finished = run.acknowledged >= run.request.num_steps
    tickets: list[Ticket] = []
    while len(tickets) < request.count and not is_finished and _may_start(state, run, env, request.sequences):
        ticket = uuid.uuid4().hex
        row = TicketRow(request.env_id, request.sequences, run.policy_version)
        state.flight.add(ticket, TicketState(row, state.clock() + state.limits.ticket_ttl_s))
        state.changes.tickets_added[ticket] = row
        tickets.append(Ticket(ticket=ticket, policy_version=run.policy_version, deadline_s=state.limits.ticket_ttl_s))
    was_waiting, env.is_waiting = env.is_waiting, len(tickets) < request.count and not is_finished
    if was_waiting and not env.is_waiting:
        state.capacity_changed = True  # what the others may take depends on who waits
    return TicketGrant(
        tickets=tickets, policy_version=run.policy_version, step=run.acknowledged, is_finished=is_finished
    )


def _may_start(state: RunState, run: RunRow, env: EnvState, sequences: int) -> bool:
    # Before the first publication nobody knows what the inference servers run.
    if run.policy_version < 0:
        return False
    left = max(0, run.request.num_steps - run.next_step) * run.request.batch_size
    places = left - state.queue.sequences - state.flight.sequences
    # Groups may come smaller than promised: the last places are given to one group at a time, even if it is too large.
    if places <= 0 or (places < sequences and state.flight.sequences > 0):
        return False  # the queue and the groups in flight already fill every step that is left
    bound = state.bound()
    if not fits(bound, state.pending(), version=run.policy_version, sequences=sequences):
        return False
    return _is_its_turn(state, env, sequences, capacity=bound.capacity_until(run.policy_version))


def _is_its_turn(state: RunState, env: EnvState, sequences: int, *, capacity: int) -> bool:
    waiting = [other for other in state.envs.values() if other.is_waiting and other is not env and state.is_live(other)]
    if not waiting:
        return True
    mine, *others = _claims(state, [env, *waiting])
    return may_take(mine, others, sequences=sequences, capacity=capacity)


def _claims(state: RunState, envs: Sequence[EnvState]) -> list[Claim]:
    means = [_tokens_per_sequence(state, env) for env in envs]
    is_measured = all(mean is not None for mean in means)
    return [
        Claim(
            env.row.request.weight,
            mean if is_measured and mean is not None else 1.0,
            sequences_of(state.flight.by_env, env.row.env_id) + sequences_of(state.queue.by_env, env.row.env_id),
        )
        for env, mean in zip(envs, means, strict=True)
    ]


def _tokens_per_sequence(state: RunState, env: EnvState) -> float | None:
    sequences = state.counters[f"trained_sequences:{env.row.env_id}"]
    return state.counters[f"trained_tokens:{env.row.env_id}"] / sequences if sequences else None


def renew(state: RunState, update: TicketUpdate) -> list[str]:
    """See Store.renew_tickets."""
    state.require_env(update.env_id, update.session)
    deadline = state.clock() + state.limits.ticket_ttl_s
    alive = [ticket for ticket in update.tickets if ticket in state.flight.tickets]
    for ticket in alive:
        state.flight.tickets[ticket].deadline = deadline
    return alive


def give_back(state: RunState, update: TicketUpdate) -> list[str]:
    """See Store.return_tickets."""
    state.require_env(update.env_id, update.session)
    return state.void_tickets(update.tickets, reason=update.reason or "unused")


def expire(state: RunState) -> int:
    """See Store.expire_tickets. Also wakes a batch that has waited long enough for an environment's minimum."""
    if any(env.lacking_since is not None for env in state.envs.values()):
        state.queue_changed = True
    return len(state.void_tickets(state.flight.late(state.clock()), reason="expired"))
