"""What a commit must write: the rows that the state machine has changed since the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from atroposlib.wire.models import EnvRequest, InferenceServer, RunInfo, RunRequest
from rollout_server.stores.base import Payload
from rollout_server.stores.payloads import Place


@dataclass(frozen=True)
class RunRow:
    """The run."""

    run_id: str
    request: RunRequest
    session: int
    policy_version: int = -1
    next_step: int = 0
    acknowledged: int = 0
    committed: int = 0

    def info(self) -> RunInfo:
        """The run as clients see it."""
        return RunInfo(
            run_name=self.request.run_name,
            run_id=self.run_id,
            session=self.session,
            policy_version=self.policy_version,
            committed_step=self.committed,
            acknowledged_step=self.acknowledged,
            request=self.request,
        )


@dataclass(frozen=True)
class EnvRow:
    """An environment."""

    env_id: int
    request: EnvRequest
    session: int
    is_connected: bool = True


class TicketRow(msgspec.Struct, frozen=True):
    """A group in flight."""

    env_id: int
    sequences: int
    policy_version: int


class GroupRow(msgspec.Struct, frozen=True):
    """A group, for good. Its place is None when its payload was never kept."""

    key: int
    group_id: str
    env_id: int
    n_sequences: int
    n_tokens: int
    oldest_version: int | None
    order_version: int
    place: Place | None
    step: int | None = None
    retired: str | None = None


@dataclass
class Changes:
    """Rows in their newest form; writing them twice does no harm."""

    run: RunRow | None = None
    envs: dict[int, EnvRow] = field(default_factory=dict)
    servers: Mapping[str, InferenceServer] | None = None
    """All of the registry, when any of it changed."""
    tickets_added: dict[str, TicketRow] = field(default_factory=dict)
    tickets_dropped: list[str] = field(default_factory=list)
    groups: list[GroupRow] = field(default_factory=list)
    payloads: list[tuple[Place, Payload]] = field(default_factory=list)
    moved: dict[int, tuple[int | None, str | None]] = field(default_factory=dict)
    """Step and reason of retirement, by key, of groups that were written before or are in `groups`."""
    counters: dict[str, int] = field(default_factory=dict)
    """New values."""
    released: list[Place] = field(default_factory=list)
    """Payloads that nobody will lease again once this is written."""

    def __bool__(self) -> bool:
        return self != _NONE


_NONE = Changes()


@dataclass(frozen=True)
class Snapshot:
    """What a server that starts again reads back."""

    run: RunRow | None
    envs: list[EnvRow]
    servers: Mapping[str, InferenceServer]
    tickets: Mapping[str, TicketRow]
    groups: list[GroupRow]
    """Those queued or in a batch that is not committed, in order of arrival."""
    counters: Mapping[str, int]
    next_key: int
