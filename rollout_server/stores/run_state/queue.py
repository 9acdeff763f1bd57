"""The groups that wait for their batch, in memory, with every count that a request needs kept as it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from rollout_server.admission import Bound
from rollout_server.batching import QueuedGroup
from rollout_server.stores.changes import GroupRow
from rollout_server.stores.payloads import Place


class StoredGroup(QueuedGroup, frozen=True):
    """A group whose payload is kept."""

    group_id: str
    place: Place

    @classmethod
    def of(cls, row: GroupRow, place: Place) -> Self:
        """The group of a row, whose payload lies there."""
        return cls(
            row.key, row.env_id, row.n_sequences, row.n_tokens, row.oldest_version, row.order_version, row.group_id, place
        )  # fmt: skip


def batch_order(group: StoredGroup) -> tuple[int, int]:
    """Sorts a batch: oldest version first, then in order of arrival."""
    return group.order_version, group.key


@dataclass
class EnvCount:
    """What one environment has, in the queue or in flight."""

    groups: int = 0
    sequences: int = 0


def sequences_of(by_env: Mapping[int, EnvCount], env_id: int) -> int:
    """What an environment has, which may be nothing yet."""
    count = by_env.get(env_id)
    return count.sequences if count is not None else 0


@dataclass
class Queue:
    """Shelves by version, each in order of arrival."""

    shelves: dict[int, dict[int, StoredGroup]] = field(default_factory=dict)
    by_version: Counter[int] = field(default_factory=Counter)
    """Sequences by oldest version; groups of unknown version are not in it."""
    sizes: Counter[int] = field(default_factory=Counter)
    """Groups by number of sequences."""
    by_env: dict[int, EnvCount] = field(default_factory=dict)
    groups: int = 0
    sequences: int = 0
    n_bytes: int = 0

    def add(self, group: StoredGroup) -> None:
        """Put a group in; one that comes back from a batch takes its old place."""
        shelf = self.shelves.setdefault(group.order_version, {})
        is_late = bool(shelf) and group.key < next(reversed(shelf))
        shelf[group.key] = group
        if is_late:
            self.shelves[group.order_version] = dict(sorted(shelf.items()))
        self._count(group, 1)

    def remove(self, group: StoredGroup) -> None:
        """Take a group out."""
        shelf = self.shelves[group.order_version]
        del shelf[group.key]
        if not shelf:
            del self.shelves[group.order_version]
        self._count(group, -1)

    def _count(self, group: StoredGroup, sign: int) -> None:
        sequences = sign * group.n_sequences
        self.groups += sign
        self.sequences += sequences
        self.n_bytes += sign * group.place.size
        self.sizes[group.n_sequences] += sign
        if not self.sizes[group.n_sequences]:
            del self.sizes[group.n_sequences]
        env = self.by_env.setdefault(group.env_id, EnvCount())
        env.groups += sign
        env.sequences += sequences
        if group.oldest_version is not None:
            self.by_version[group.oldest_version] += sequences
            if not self.by_version[group.oldest_version]:
                del self.by_version[group.oldest_version]

    def in_order(self) -> Iterator[StoredGroup]:
        """Oldest version first, then in order of arrival."""
        for version in sorted(self.shelves):
            yield from self.shelves[version].values()

    def stale(self, bound: Bound) -> list[StoredGroup]:
        """Groups that can no longer be trained. Empty as long as admission keeps its promise."""
        return [
            group
            for version, shelf in self.shelves.items()
            if bound.is_stale(version)
            for group in shelf.values()
            if bound.is_stale(group.oldest_version)
        ]
