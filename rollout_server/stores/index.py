"""The queue and the tickets of one run, in memory, so that no request scans a table. Rebuilt from the store at start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from rollout_server.admission import Bound, fits, overfull_version
from rollout_server.batching import SEARCH_WINDOW, QueuedGroup, choose_batch


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A group that waits for its batch."""

    key: int
    n_sequences: int
    n_bytes: int
    oldest_version: int | None
    order_version: int
    """oldest_version, or the policy version at arrival where the sender does not know its own."""


@dataclass(slots=True)
class TicketEntry:
    """A group in flight."""

    env_id: int
    sequences: int
    policy_version: int
    deadline: float
    """Unix time, seconds."""


@dataclass
class RunIndex:
    """Queue by version, tickets, and the counts that admission and status need."""

    queue: dict[int, dict[int, QueueEntry]] = field(default_factory=dict)
    tickets: dict[str, TicketEntry] = field(default_factory=dict)
    pending: Counter[int] = field(default_factory=Counter)
    """Sequences queued or in flight, by oldest version."""
    queued_groups: int = 0
    queued_sequences: int = 0
    queued_bytes: int = 0

    def enqueue(self, entry: QueueEntry) -> None:
        """Add a group to the queue."""
        self.queue.setdefault(entry.order_version, {})[entry.key] = entry
        self.queued_groups += 1
        self.queued_sequences += entry.n_sequences
        self.queued_bytes += entry.n_bytes
        if entry.oldest_version is not None:
            self._pend(entry.oldest_version, entry.n_sequences)

    def dequeue(self, entry: QueueEntry) -> None:
        """Take a group out of the queue."""
        shelf = self.queue[entry.order_version]
        del shelf[entry.key]
        if not shelf:
            del self.queue[entry.order_version]
        self.queued_groups -= 1
        self.queued_sequences -= entry.n_sequences
        self.queued_bytes -= entry.n_bytes
        if entry.oldest_version is not None:
            self._pend(entry.oldest_version, -entry.n_sequences)

    def add_ticket(self, ticket: str, entry: TicketEntry) -> None:
        """Count a group in flight."""
        self.tickets[ticket] = entry
        self._pend(entry.policy_version, entry.sequences)

    def drop_ticket(self, ticket: str) -> TicketEntry | None:
        """Forget a ticket; None when it was void already."""
        entry = self.tickets.pop(ticket, None)
        if entry is not None:
            self._pend(entry.policy_version, -entry.sequences)
        return entry

    def may_start(self, bound: Bound, *, version: int, sequences: int) -> bool:
        """Whether one more group of this version keeps the staleness bound."""
        return fits(bound, self.pending, version=version, sequences=sequences)

    def in_order(self) -> Iterator[QueueEntry]:
        """Queued groups, oldest version first, then in order of arrival."""
        for version in sorted(self.queue):
            yield from self.queue[version].values()

    def stale(self, bound: Bound) -> list[QueueEntry]:
        """Queued groups that can no longer be trained. Empty as long as admission keeps its promise."""
        return [
            entry
            for version, shelf in self.queue.items()
            if bound.is_stale(version)
            for entry in shelf.values()
            if bound.is_stale(entry.oldest_version)
        ]

    def next_batch(self, bound: Bound) -> list[QueueEntry] | str:
        """The groups of the next batch, or what it waits for."""
        if self.queued_sequences < bound.batch_size:
            return (
                f"{bound.batch_size - self.queued_sequences} more sequences for step {bound.next_step}"
                f" ({self.queued_sequences} of {bound.batch_size} queued, {len(self.tickets)} groups in flight)"
            )
        entries = {entry.key: entry for entry in islice(self.in_order(), bound.batch_size + SEARCH_WINDOW)}
        chosen = choose_batch(
            [QueuedGroup(entry.key, entry.n_sequences) for entry in entries.values()], bound.batch_size
        )
        if chosen is None:
            sizes = sorted({entry.n_sequences for entry in entries.values()})
            return f"groups that sum to exactly batch_size={bound.batch_size}; queued group sizes are {sizes}"
        batch = [entries[group.key] for group in chosen]
        older = self._must_wait_for(bound, batch)
        if older:
            return f"{older} older groups in flight that step {bound.next_step} must leave room for (max_staleness)"
        return batch

    def _must_wait_for(self, bound: Bound, batch: Sequence[QueueEntry]) -> int:
        """Groups in flight that could no longer be trained in time if this batch left now."""
        stays = Counter(self.pending)
        for entry in batch:
            if entry.oldest_version is not None:
                stays[entry.oldest_version] -= entry.n_sequences
        overfull = overfull_version(replace(bound, next_step=bound.next_step + 1), +stays)
        if overfull is None:
            return 0
        return sum(entry.policy_version <= overfull for entry in self.tickets.values())

    def _pend(self, version: int, sequences: int) -> None:
        self.pending[version] += sequences
        if self.pending[version] == 0:
            del self.pending[version]
