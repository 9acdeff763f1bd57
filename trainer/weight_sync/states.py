"""The state machine of one weight publication: which edge may follow which state, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
    """Seconds that each edge may take, for every server at once."""

    probe_s: float
    """For a sign of life, which no engine step delays."""
    attach_s: float
    pause_s: float
    send_s: float
    verify_s: float
    resume_s: float

    @classmethod
    def within(cls, timeout_s: float) -> Deadlines:
        """Give the transfer `timeout_s`, and the short control calls at most 20 seconds of it."""
        # An engine answers between two steps; a long prefill on a busy CPU takes seconds.
        control_s = min(20.0, timeout_s)
        return cls(
            probe_s=min(5.0, timeout_s),
            attach_s=control_s,
            pause_s=control_s,
            send_s=timeout_s,
            verify_s=control_s,
            resume_s=control_s,
        )
