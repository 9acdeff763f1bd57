"""A recorded run as a store: hands out its batches again, the same bytes in the same order, and takes nothing in."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn, Self, TypeVar

from atroposlib.errors import AtroposError, ConfigError, FencedError, NoRunError, StepError
from atroposlib.wire.columns import Blob
from atroposlib.wire.models import (
    EnvInfo,
    EnvRequest,
    GroupRecords,
    GroupResult,
    InferenceServer,
    NackRequest,
    NackResult,
    RunInfo,
    RunRequest,
    Status,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
)
from rollout_server.batching import shard_groups
from rollout_server.run_database.recorded import open_recorded
from rollout_server.stores.base import WHOLE, Batch, NotReady, Payload, Shard
from rollout_server.stores.run_reader import RunReader

T = TypeVar("T")


class ReplayError(AtroposError):
    """A replay only gives; it can take nothing."""

    code = "replay"
    status = 409


@dataclass(frozen=True)
class Recording:
    """What the folder keeps."""

    run: RunInfo
    batches: Counter[int]
    """Groups of each step's batch."""
    steps: range
    """Those whose payload is still kept, whole."""


class ReplayStore:
    """See stores.base.Store. What a trainer says is kept in memory only; the recorded run is never written to.

    Args:
        recorded: the run.
        recording: what is kept of it.
        reader: the one thread that reads it.
        seconds_per_step: pace of the replay, counted from the opening of the run; 0 is as fast as it is asked.
    """

    def __init__(
        self, recorded: RunReader, recording: Recording, reader: ThreadPoolExecutor, *, seconds_per_step: float = 0.0
    ) -> None:
        self.on_capacity: Callable[[], None] = lambda: None
        self.on_queue: Callable[[], None] = lambda: None
        self.on_event: Callable[[str, str], None] = lambda kind, text: None
        self._recorded = recorded
        self._recording = recording
        self._reader = reader
        self._seconds_per_step = seconds_per_step
        self._run: RunInfo | None = None
        self._started_at = 0.0
        self._next_step = 0
        self._heard_at = 0.0
        self._waits_for: str | None = None

    @classmethod
    async def open(cls, folder: Path, *, seconds_per_step: float = 0.0) -> Self:
        """Find out what the folder keeps.

        Raises:
            ConfigError: it holds no run, or no batch of it.
        """
        reader = ThreadPoolExecutor(1, thread_name_prefix="replay")
        loop = asyncio.get_running_loop()
        recorded = await loop.run_in_executor(reader, open_recorded, folder)
        recording = await loop.run_in_executor(reader, survey, recorded)
        if not recording.steps:
            await loop.run_in_executor(reader, recorded.close)
            raise ConfigError(
                f"{folder} keeps no batch of run {recording.run.run_name!r}, so there is nothing to replay"
            )
        return cls(recorded, recording, reader, seconds_per_step=seconds_per_step)

    # The trainer's side

    async def open_run(self, request: RunRequest) -> RunInfo:
        """See Store.open_run. The batch size and the steps must be those that were recorded."""
        _check(self._recording, request)
        start, session = request.start_step or 0, 1 if self._run is None else self._run.session + 1
        self._run = RunInfo(
            run_name=request.run_name,
            run_id=uuid.uuid4().hex,
            session=session,
            policy_version=-1,
            committed_step=start,
            acknowledged_step=start,
            request=request,
        )
        self._started_at = self._now() - start * self._seconds_per_step
        self._next_step, self._heard_at = start, self._now()
        self.on_event("run_opened", f"run {request.run_name} replays {self._recording.run.run_name} from step {start}")
        return self._run

    async def close_run(self) -> None:
        """See Store.close_run. The recorded run stays."""
        self._run = None

    async def run_info(self) -> RunInfo:
        """See Store.run_info."""
        if self._run is None:
            raise NoRunError("no trainer has opened a run on this replay yet; start atropos-trainer, or POST /v1/run")
        return self._run

    async def renew_trainer(self, session: int) -> None:
        """See Store.renew_trainer."""
        await self._trainer(session)

    async def lease(self, step: int, session: int, shard: Shard = WHOLE) -> Batch | NotReady:
        """See Store.lease. Any recorded step, any number of times."""
        run = await self._trainer(session)
        if step not in self._recording.steps or step >= run.request.num_steps:
            raise StepError(
                f"step {step} cannot be replayed: {_kept(self._recording)}, num_steps={run.request.num_steps}"
            )
        wait_s = self._started_at + step * self._seconds_per_step - self._now()
        if wait_s > 0:
            asyncio.get_running_loop().call_later(wait_s, self.on_queue)
            self._waits_for = f"its time: the replay gives a step every {self._seconds_per_step:g} s"
            return NotReady(self._waits_for)
        self._waits_for = None
        groups = await self._read(lambda: list(self._recorded.groups(range(step, step + 1))))
        if len(groups) != self._recording.batches[step]:
            raise StepError(
                f"step {step} cannot be replayed: its payload was deleted meanwhile; {_kept(self._recording)}"
            )
        if shard.count > 1:
            part = shard_groups([record.n_tokens for record, _ in groups], shard.count)[shard.index]
            groups = [groups[index] for index in part]
        self._next_step = max(self._next_step, step + 1)
        return Batch(step, [payload for _, payload in groups])

    async def nack(self, step: int, request: NackRequest) -> NackResult:
        """Refused: the recorded batch is what it is."""
        self._refuse("dissolves no batch")

    async def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """See Store.ack."""
        run = await self._trainer(session)
        if step >= self._next_step:
            raise StepError(f"step {step} was not leased; the last leased is {self._next_step - 1}")
        self._move(run, acknowledged_step=max(run.acknowledged_step, step + 1), policy_version=policy_version)
        self.on_event("step_acknowledged", f"step {step} is done")

    async def commit(self, step: int, session: int) -> None:
        """See Store.commit."""
        run = await self._trainer(session)
        if step > run.acknowledged_step:
            raise StepError(f"step {step} cannot be committed: {run.acknowledged_step} steps are acknowledged")
        self._move(run, committed_step=max(run.committed_step, step))

    async def set_policy(self, policy_version: int, session: int) -> None:
        """See Store.set_policy."""
        self._move(await self._trainer(session), policy_version=policy_version)

    # The environments' side: refused

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """Refused."""
        self._refuse("takes no environments")

    async def touch_env(self, env_id: int) -> bool:
        """See Store.touch_env."""
        return False

    async def disconnect_env(self, env_id: int) -> bool:
        """See Store.disconnect_env."""
        return False

    async def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """Refused."""
        self._refuse("gives no tickets")

    async def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """Refused."""
        self._refuse("gives no tickets")

    async def return_tickets(self, update: TicketUpdate) -> list[str]:
        """Refused."""
        self._refuse("gives no tickets")

    async def expire_tickets(self) -> int:
        """See Store.expire_tickets. There are none."""
        return 0

    async def append(self, blobs: Sequence[Blob], *, is_strict: bool = True) -> list[GroupResult]:
        """Refused."""
        self._refuse("takes no groups")

    async def known(self, group_ids: Sequence[str]) -> set[str]:
        """See Store.known. Nothing can be posted, so nothing can be posted twice."""
        return set()

    async def register_server(self, server: InferenceServer) -> None:
        """Passed over: a replay has no use for inference servers."""

    async def remove_server(self, url: str) -> bool:
        """See Store.remove_server."""
        return False

    # Anyone

    async def status(self) -> Status:
        """See Store.status."""
        run = self._run
        if run is None:
            return Status()
        return Status(
            run_name=run.run_name,
            run_id=run.run_id,
            batch_size=run.request.batch_size,
            max_staleness=run.request.max_staleness,
            late_policy=run.request.late_policy,
            step=run.acknowledged_step,
            formed_steps=self._next_step,
            num_steps=run.request.num_steps,
            policy_version=run.policy_version,
            committed_step=run.committed_step,
            trainer_last_seen_s=self._now() - self._heard_at,
            trainer_waits_for=self._waits_for,
        )

    async def records(self, after: int = 0, limit: int = 10_000) -> GroupRecords:
        """See Store.records; those of the recorded run."""
        found = await self._read(lambda: list(islice(self._recorded.records(), after, after + limit + 1)))
        return GroupRecords(records=found[:limit], next=after + limit if len(found) > limit else None)

    async def latest_group(self) -> Payload | None:
        """See Store.latest_group. None was posted."""
        return None

    async def close(self) -> None:
        """See Store.close."""
        await self._read(self._recorded.close)
        self._reader.shutdown()

    async def _read(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, call)

    async def _trainer(self, session: int) -> RunInfo:
        run = await self.run_info()
        if session != run.session:
            raise FencedError(
                f"run {run.run_name!r} was taken over: session {session} is over, {run.session} is the trainer now; stop this one"
            )
        self._heard_at = self._now()
        return run

    def _move(
        self,
        run: RunInfo,
        *,
        acknowledged_step: int | None = None,
        committed_step: int | None = None,
        policy_version: int | None = None,
    ) -> None:
        self._run = run.model_copy(
            update={
                "acknowledged_step": run.acknowledged_step if acknowledged_step is None else acknowledged_step,
                "committed_step": run.committed_step if committed_step is None else committed_step,
                "policy_version": max(run.policy_version, -1 if policy_version is None else policy_version),
            }
        )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _refuse(self, what: str) -> NoReturn:
        raise ReplayError(
            f"this server replays run {self._recording.run.run_name!r} and {what}; for a live run start run-api"
        )


def survey(recorded: RunReader) -> Recording:
    """Which steps can be replayed. Retention deletes the oldest payload first, so they are the last ones."""
    batches = Counter(
        record.step for record in recorded.records() if record.state == "batched" and record.step is not None
    )
    first, end = min(batches, default=0), max(batches, default=-1) + 1
    while first < end and sum(1 for _ in recorded.groups(range(first, first + 1))) != batches[first]:
        first += 1
    return Recording(recorded.run, batches, range(first, end))


def _check(recording: Recording, request: RunRequest) -> None:
    recorded = recording.run.request
    if request.batch_size != recorded.batch_size:
        raise ConfigError(
            f"the recorded batches hold batch_size={recorded.batch_size} sequences, not {request.batch_size};"
            f" set batch_size={recorded.batch_size}"
        )
    start = request.start_step or 0
    if start < recording.steps.start:
        raise StepError(
            f"step {start} cannot be replayed: {_kept(recording)}; resume from a checkpoint of step {recording.steps.start} or later"
        )
    if request.num_steps > recording.steps.stop:
        raise StepError(
            f"num_steps={request.num_steps} cannot be replayed: {_kept(recording)}; set num_steps={recording.steps.stop}"
        )


def _kept(recording: Recording) -> str:
    return f"the folder keeps the batches of steps {recording.steps.start} to {recording.steps.stop - 1}"
