"""Where changes are written down: a protocol, and the journal that keeps nothing beyond its process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from atroposlib.wire.models import GroupRecord, GroupRecords
from rollout_server.stores.changes import Changes, GroupRow, Snapshot
from rollout_server.stores.payloads import MemoryPayloads, Payloads


class Journal(Protocol):
    """One run's rows and payloads. `write`, `archive` and `close` are called on one thread, one after another."""

    @property
    def payloads(self) -> Payloads:
        """Where the bytes of the open run lie."""

    def load(self) -> Snapshot:
        """What a server that starts again goes on with."""

    def write(self, changes: Changes, payloads: Payloads) -> None:
        """All or nothing, and durable on return.

        Args:
            payloads: of the run that the changes belong to, which may be on its way to the archive.
        """

    def archive(self, run_name: str, payloads: Payloads) -> None:
        """Put a run and its payloads aside and start clean."""

    def fresh_payloads(self) -> Payloads:
        """The payloads of the run that the next `archive` makes room for."""

    def known(self, group_ids: Sequence[str]) -> set[str]:
        """Which of these groups are written."""

    def records(self, after: int, limit: int) -> GroupRecords:
        """See Store.records."""

    def close(self) -> None:
        """Release the files."""


EMPTY = Snapshot(run=None, envs=[], servers={}, tickets={}, groups=[], counters={}, next_key=1)


def record_of(row: GroupRow) -> GroupRecord:
    """A row as clients see it."""
    return GroupRecord(
        group_id=row.group_id,
        env_id=row.env_id,
        n_sequences=row.n_sequences,
        n_tokens=row.n_tokens,
        state="retired" if row.retired is not None else "queued" if row.step is None else "batched",
        step=row.step,
        oldest_version=row.oldest_version,
        reason=row.retired,
    )


def page(rows: Sequence[GroupRow], limit: int) -> GroupRecords:
    """Rows of up to limit + 1 groups as a page."""
    shown = rows[:limit]
    return GroupRecords(records=[record_of(row) for row in shown], next=shown[-1].key if len(rows) > limit else None)


class MemoryJournal:
    """See Journal. For tests, notebooks and machines whose disk must not be touched: a killed server loses the run."""

    def __init__(self) -> None:
        self._payloads = MemoryPayloads()
        self._rows: dict[int, GroupRow] = {}
        self._ids: set[str] = set()

    @property
    def payloads(self) -> Payloads:
        """See Journal."""
        return self._payloads

    def load(self) -> Snapshot:
        """See Journal."""
        return EMPTY

    def write(self, changes: Changes, payloads: Payloads) -> None:
        """See Journal."""
        payloads.write(changes.payloads)
        for row in changes.groups:
            self._rows[row.key] = row
            self._ids.add(row.group_id)
        for key, (step, retired) in changes.moved.items():
            self._rows[key] = msgspec.structs.replace(self._rows[key], step=step, retired=retired)

    def archive(self, run_name: str, payloads: Payloads) -> None:
        """See Journal. There is nowhere to put it."""
        self._rows.clear()
        self._ids.clear()

    def fresh_payloads(self) -> Payloads:
        """See Journal."""
        self._payloads = MemoryPayloads()
        return self._payloads

    def known(self, group_ids: Sequence[str]) -> set[str]:
        """See Journal."""
        return self._ids.intersection(group_ids)

    def records(self, after: int, limit: int) -> GroupRecords:
        """See Journal."""
        rows = [row for key, row in list(self._rows.items()) if key > after]
        return page(rows[: limit + 1], limit)

    def close(self) -> None:
        """See Journal."""
