"""What the scripts of the Redis store answer, and the wire models made of it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from atroposlib.wire.models import (
    EnvRequest,
    EnvStatus,
    GroupRecord,
    InferenceServer,
    InferenceServerStatus,
    RunInfo,
    RunRequest,
    Status,
)


class RunFacts(msgspec.Struct, frozen=True):
    """The open run."""

    run_name: str
    run_id: str
    session: int
    policy_version: int
    committed: int
    acknowledged: int
    request: str
    """JSON of the RunRequest."""

    def info(self) -> RunInfo:
        """As its trainer sees it."""
        return RunInfo(
            run_name=self.run_name,
            run_id=self.run_id,
            session=self.session,
            policy_version=self.policy_version,
            committed_step=self.committed,
            acknowledged_step=self.acknowledged,
            request=RunRequest.model_validate_json(self.request),
        )


class EnvJoined(msgspec.Struct, frozen=True):
    """An environment's place in the run."""

    env_id: int
    session: int
    run: RunFacts


class Granted(msgspec.Struct, frozen=True):
    """How many tickets were given."""

    granted: int
    policy_version: int
    step: int
    is_finished: bool


class Expired(msgspec.Struct, frozen=True):
    """What a sweep found."""

    expired: int
    has_more: bool
    released_bytes: int
    archive_bytes: int


class BatchRow(msgspec.Struct, frozen=True, array_like=True):
    """A group of a batch."""

    group_id: str
    payload: str
    n_tokens: int
    n_bytes: int


class RecordRow(msgspec.Struct, frozen=True, array_like=True):
    """A group of the ledger; -1 and the empty text stand for nothing."""

    group_id: str
    env_id: int
    n_sequences: int
    n_tokens: int
    oldest_version: int
    step: int
    reason: str

    def record(self) -> GroupRecord:
        """As the wire has it."""
        return GroupRecord(
            group_id=self.group_id,
            env_id=self.env_id,
            n_sequences=self.n_sequences,
            n_tokens=self.n_tokens,
            state="retired" if self.reason else "queued" if self.step < 0 else "batched",
            step=None if self.step < 0 else self.step,
            oldest_version=None if self.oldest_version < 0 else self.oldest_version,
            reason=self.reason or None,
        )


class Records(msgspec.Struct, frozen=True):
    """A stretch of the ledger; last_key is the newest of all."""

    rows: list[RecordRow]
    last_key: int


class Nacked(msgspec.Struct, frozen=True):
    """What became of a dissolved batch."""

    requeued: int
    retired: int


class EnvFacts(msgspec.Struct, frozen=True):
    """An environment, without what the counters say."""

    env_id: int
    request: str
    """JSON of the EnvRequest."""
    is_connected: bool
    last_seen_ms: float
    tickets: int
    queued_groups: int
    queued_sequences: int

    def status(self, counters: Mapping[str, int]) -> EnvStatus:
        """As the wire has it."""
        request = EnvRequest.model_validate_json(self.request)
        return EnvStatus(
            env_id=self.env_id,
            name=request.name,
            group_size=request.group_size,
            max_token_len=request.max_token_len,
            weight=request.weight,
            min_batch_allocation=request.min_batch_allocation,
            is_connected=self.is_connected,
            last_seen_s=self.last_seen_ms / 1000,
            tickets=self.tickets,
            queued_groups=self.queued_groups,
            queued_sequences=self.queued_sequences,
            groups_accepted=counters.get(f"env:{self.env_id}", 0),
            trained_tokens=counters.get(f"trained_tokens:{self.env_id}", 0),
        )


class StatusFacts(msgspec.Struct, frozen=True):
    """The counters of the run."""

    next_step: int
    queue_groups: int
    queue_sequences: int
    queue_bytes: int
    tickets: int
    in_flight: int
    sizes: list[int]
    counters: list[tuple[str, int]]
    envs: list[EnvFacts]
    servers: list[tuple[str, float]]
    """JSON of the InferenceServer, and milliseconds since it was reported."""
    run: RunFacts | None = None
    waits_for: str | None = None
    trainer_last_seen_ms: float | None = None

    def status(self) -> Status:
        """As the wire has it."""
        counters = dict(self.counters)
        status = Status(
            queued_groups=self.queue_groups,
            queued_sequences=self.queue_sequences,
            queued_bytes=self.queue_bytes,
            largest_queued_group=max(self.sizes, default=0),
            group_sizes_queued=sorted(self.sizes)[:64],
            tickets_outstanding=self.tickets,
            sequences_in_flight=self.in_flight,
            groups_accepted=counters.get("groups_accepted", 0),
            groups_duplicate=counters.get("groups_duplicate", 0),
            groups_retired=_with_prefix(counters, "retired:"),
            tickets_returned=_with_prefix(counters, "ticket:"),
            envs=[env.status(counters) for env in self.envs],
            inference_servers=[
                InferenceServerStatus(server=InferenceServer.model_validate_json(server), last_seen_s=silent_ms / 1000)
                for server, silent_ms in self.servers
            ],
        )
        return status if self.run is None else status.model_copy(update=self._run_fields(self.run))

    def _run_fields(self, run: RunFacts) -> dict[str, object]:
        request = RunRequest.model_validate_json(run.request)
        places = request.batch_size * (run.policy_version + request.max_staleness + 1)
        return {
            "run_name": run.run_name,
            "run_id": run.run_id,
            "batch_size": request.batch_size,
            "max_staleness": request.max_staleness,
            "late_policy": request.late_policy,
            "step": run.acknowledged,
            "formed_steps": self.next_step,
            "num_steps": request.num_steps,
            "policy_version": run.policy_version,
            "committed_step": run.committed,
            "admitted_sequences": self.next_step * request.batch_size + self.queue_sequences + self.in_flight,
            "capacity_sequences": max(0, places) if run.policy_version >= 0 else 0,
            "trainer_last_seen_s": None if self.trainer_last_seen_ms is None else self.trainer_last_seen_ms / 1000,
            "trainer_waits_for": self.waits_for,
        }


def _with_prefix(counters: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): value for name, value in counters.items() if name.startswith(prefix)}
