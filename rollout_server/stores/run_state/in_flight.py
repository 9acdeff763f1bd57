"""The groups that are being rolled out, by their tickets, with every count that a request needs kept as it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from rollout_server.stores.changes import TicketRow
from rollout_server.stores.run_state.queue import EnvCount


@dataclass
class TicketState:
    """A group in flight."""

    row: TicketRow
    deadline: float
    """Unix time, seconds."""


@dataclass
class InFlight:
    """Tickets that are not void."""

    tickets: dict[str, TicketState] = field(default_factory=dict)
    sequences: int = 0
    sequences_by_version: Counter[int] = field(default_factory=Counter)
    groups_by_version: Counter[int] = field(default_factory=Counter)
    by_env: dict[int, EnvCount] = field(default_factory=dict)

    def add(self, ticket: str, state: TicketState) -> None:
        """A group starts."""
        self.tickets[ticket] = state
        self._count(state.row, 1)

    def remove(self, ticket: str) -> bool:
        """A group ends; False when its ticket was void already."""
        state = self.tickets.pop(ticket, None)
        if state is not None:
            self._count(state.row, -1)
        return state is not None

    def of_env(self, env_id: int) -> list[str]:
        """Its tickets."""
        return [ticket for ticket, state in self.tickets.items() if state.row.env_id == env_id]

    def late(self, now: float) -> list[str]:
        """Tickets whose deadline has passed."""
        return [ticket for ticket, state in self.tickets.items() if state.deadline < now]

    def oldest_first(self) -> Iterator[str]:
        """Tickets by policy version, those of one version in the order in which they were given."""
        yield from sorted(self.tickets, key=lambda ticket: self.tickets[ticket].row.policy_version)

    def _count(self, row: TicketRow, sign: int) -> None:
        self.sequences += sign * row.sequences
        env = self.by_env.setdefault(row.env_id, EnvCount())
        env.groups += sign
        env.sequences += sign * row.sequences
        _shift(self.sequences_by_version, row.policy_version, sign * row.sequences)
        _shift(self.groups_by_version, row.policy_version, sign)


def _shift(counts: Counter[int], version: int, amount: int) -> None:
    counts[version] += amount
    if not counts[version]:
        del counts[version]
