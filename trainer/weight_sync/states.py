"""The state machine of one weight publication: which edge may follow which state, and for how long."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

GRACE_S = 1.0
"""Who watches a call lets it overrun its deadline by this much: its own error says more than "did not return"."""

_CONTROL_S = 20.0
"""An engine answers between two steps, and a long prefill on a busy CPU takes seconds."""
_PROBE_S = 5.0
_WATCHED_STEPS = 10

ATTEMPTS = 3
"""The first finds out who died or was restarted; the second goes without the dead; the third also goes without a server
that answers and yet spoils the transfer."""


class State(StrEnum):
    """Where a publication stands. A state is entered before its work, so a failed pause is still resumed."""

    IDLE = "idle"
    PAUSED = "paused"
    SENDING = "sending"
    VERIFYING = "verifying"
    RESUMED = "resumed"


class Edge(StrEnum):
    """A step of a publication. Errors and deadlines carry its name."""

    ATTACH = "attach"
    """Ask who is there and open the group; the engines keep generating."""
    PAUSE = "pause"
    SEND = "send"
    VERIFY = "verify"
    RESUME = "resume"


_TRANSITIONS = {
    (State.IDLE, Edge.ATTACH): State.IDLE,
    (State.IDLE, Edge.PAUSE): State.PAUSED,
    (State.PAUSED, Edge.SEND): State.SENDING,
    (State.SENDING, Edge.VERIFY): State.VERIFYING,
    # Whatever went wrong, the way out of a pause is a resume.
    (State.PAUSED, Edge.RESUME): State.RESUMED,
    (State.SENDING, Edge.RESUME): State.RESUMED,
    (State.VERIFYING, Edge.RESUME): State.RESUMED,
}


def advance(state: State, edge: Edge) -> State:
    """Return the state that `edge` leads to.

    Raises:
        ValueError: the edge may not be taken from this state.
    """
    try:
        return _TRANSITIONS[state, edge]
    except KeyError:
        raise ValueError(f"a publication that is {state} cannot {edge}") from None


@dataclass(frozen=True)
class Deadlines:
    """Seconds that each edge may take, for every server at once. None is longer than `send_s`."""

    probe_s: float
    """For a sign of life, which no engine step delays."""
    attach_s: float
    """To answer a question about the engine."""
    drain_s: float
    """To let requests in flight end, where pausing waits for them. Those that remain are then aborted."""
    pause_s: float
    send_s: float
    """To open the way to the servers, and to bring the weights there."""
    verify_s: float
    resume_s: float
    leave_s: float
    """To give up the way to the servers."""

    @classmethod
    def within(cls, timeout_s: float) -> Deadlines:
        """Give the transfer `timeout_s`, and the short control calls at most 20 seconds of it."""
        control_s = min(_CONTROL_S, timeout_s)
        probe_s = min(_PROBE_S, timeout_s)
        return cls(
            probe_s=probe_s,
            attach_s=control_s,
            drain_s=timeout_s,
            pause_s=control_s,
            send_s=timeout_s,
            verify_s=control_s,
            resume_s=control_s,
            leave_s=probe_s,
        )

    @property
    def publication_s(self) -> float:
        """The longest that a publication can take, with every call of every attempt at its deadline."""
        ask_s = 2 * self.probe_s + self.attach_s
        stand_still_s = self.drain_s + self.pause_s + self.send_s + 2 * self.verify_s + 2 * self.resume_s
        open_s = prove_s = self.send_s
        return ATTEMPTS * (ask_s + open_s + stand_still_s + prove_s + self.leave_s + _WATCHED_STEPS * GRACE_S)


def time_left(deadline: float) -> float:
    """The seconds until `deadline` on time.monotonic(), or a moment if it has passed: the call then fails by itself."""
    return max(deadline - time.monotonic(), 0.05)
