"""A request that is refused changes nothing: not the run, not what will be written, not who is woken or told."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest

from atroposlib.errors import (
    AtroposError,
    ConfigError,
    FencedError,
    GroupFormatError,
    NoRunError,
    ProtocolError,
    QueueFullError,
    StepError,
    UnknownEnvError,
)
from atroposlib.wire.columns import Blob
from atroposlib.wire.models import EnvRequest, NackRequest, RunRequest, TicketRequest, TicketUpdate
from rollout_server.stores.base import StoreLimits
from rollout_server.stores.payloads import MemoryPayloads
from rollout_server.stores.run_state import batches, groups, registry, runs, tickets
from rollout_server.stores.run_state.state import RunState
from tests.rollout_server.simulation import a_blob

TRAINER, EARLIER = 2, 1
"""Sessions of the run, and of its environment."""


def a_run(**facts: int) -> RunRequest:
    wanted = {"batch_size": 2, "max_staleness": 3, "num_steps": 3, "group_size": 2, "max_token_len": 4, **facts}
    return RunRequest.model_validate({"run_name": "run", **wanted})


def post(state: RunState, *blobs: Blob) -> None:
    groups.append(state, blobs, known=set(), is_strict=True)


def an_empty_state() -> RunState:
    return RunState(StoreLimits(max_queued_bytes=20), MemoryPayloads().allocate, clock=lambda: 0.0)


def a_busy_state() -> RunState:
    """Two batches formed, the first committed; g3 queued, a ticket in flight, trainer and environment in their second session."""
    state = an_empty_state()
    runs.open_run(state, a_run())
    registry.register_env(state, EnvRequest(name="env", group_size=2))
    env = registry.register_env(state, EnvRequest(name="env", group_size=2)).session
    runs.set_policy(state, 0, EARLIER)
    granted = tickets.grant(state, TicketRequest(env_id=0, session=env, sequences=2, count=3)).tickets
    for step, ticket in enumerate(granted[:2]):
        post(state, a_blob(f"g{step + 1}", version=0, ticket=ticket.ticket, n=2))
        batches.lease(state, step, EARLIER)
    batches.ack(state, 0, EARLIER, None)
    batches.commit(state, 1, EARLIER)
    post(state, a_blob("g3", version=0, ticket=None, n=2))
    runs.open_run(state, a_run(num_steps=2))
    assert (sorted(state.batches), state.queue.groups, len(state.flight.tickets)) == ([1], 1, 1)
    state.take_changes()
    state.events.clear()
    state.capacity_changed = state.queue_changed = False
    return state


def facts(state: RunState) -> dict[str, object]:
    return {name: deepcopy(value) for name, value in vars(state).items() if name not in ("allocate", "clock")}


def the_ticket(state: RunState, session: int) -> TicketUpdate:
    return TicketUpdate(env_id=0, session=session, tickets=list(state.flight.tickets))


def two_blobs(**of_second: int) -> list[Blob]:
    """The first of which may come in."""
    first, second = ({"n": 2, **more} for more in ({}, of_second))
    return [a_blob("n1", version=0, ticket=None, **first), a_blob("n2", version=0, ticket=None, **second)]


REFUSALS: dict[str, tuple[type[AtroposError], Callable[[RunState], object]]] = {
    "a run at a step whose batches are gone": (StepError, lambda s: runs.open_run(s, a_run(start_step=0))),
    "a run that cannot replay": (ConfigError, lambda s: runs.open_run(s, a_run(batch_size=4))),
    "a policy of an earlier trainer": (FencedError, lambda s: runs.set_policy(s, 1, EARLIER)),
    "an environment of another group size": (
        ConfigError,
        lambda s: registry.register_env(s, EnvRequest(name="env", group_size=4)),
    ),
    "tickets of an earlier session": (
        UnknownEnvError,
        lambda s: tickets.grant(s, TicketRequest(env_id=0, session=EARLIER, sequences=2, count=1)),
    ),
    "renewal by an earlier session": (UnknownEnvError, lambda s: tickets.renew(s, the_ticket(s, EARLIER))),
    "return by an earlier session": (UnknownEnvError, lambda s: tickets.give_back(s, the_ticket(s, EARLIER))),
    "a second group of nobody": (UnknownEnvError, lambda s: post(s, *two_blobs(env_id=7))),
    "a second group too long": (GroupFormatError, lambda s: post(s, *two_blobs(length=5))),
    "a second group too much": (QueueFullError, lambda s: post(s, *two_blobs())),
    "a lease by an earlier trainer": (FencedError, lambda s: batches.lease(s, 1, EARLIER)),
    "a lease of a committed step": (StepError, lambda s: batches.lease(s, 0, TRAINER)),
    "a lease after the last step": (StepError, lambda s: batches.lease(s, 2, TRAINER)),
    "a nack of an acknowledged step": (StepError, lambda s: batches.nack(s, 0, a_nack())),
    "a nack that retires a queued group": (ProtocolError, lambda s: batches.nack(s, 1, a_nack("g2", "g3"))),
    "an ack of a step not formed": (StepError, lambda s: batches.ack(s, 2, TRAINER, 5)),
    "a commit before its ack": (StepError, lambda s: batches.commit(s, 2, TRAINER)),
}


def a_nack(*retire: str) -> NackRequest:
    return NackRequest(session=TRAINER, reason="corrupt", retire=list(retire))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_changes_nothing(name: str) -> None:
    error, request = REFUSALS[name]
    state = a_busy_state()
    before = facts(state)

    with pytest.raises(error):
        request(state)

    assert facts(state) == before


@pytest.mark.parametrize(
    "request_of",
    [
        lambda s: registry.register_env(s, EnvRequest(name="env", group_size=2)),
        lambda s: tickets.grant(s, TicketRequest(env_id=0, session=1, sequences=2, count=1)),
        lambda s: post(s, *two_blobs()),
        lambda s: batches.lease(s, 0, 1),
    ],
    ids=["environment", "tickets", "groups", "lease"],
)
def test_before_a_run_is_opened_requests_are_refused_and_change_nothing(
    request_of: Callable[[RunState], object],
) -> None:
    state = an_empty_state()
    before = facts(state)

    with pytest.raises(NoRunError):
        request_of(state)

    assert facts(state) == before
