"""The store of several rollout servers: the run in Redis or Valkey, every change one Lua script, this process holding nothing."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import numpy as np
from redis.exceptions import OutOfMemoryError

from atroposlib.errors import (
    AtroposError,
    ConfigError,
    GroupFormatError,
    NoRunError,
    QueueFullError,
    StoreUnavailableError,
)
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
    Ticket,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
)
from rollout_server.batching import SEARCH_WINDOW, Wait, shard_groups
from rollout_server.stores.base import WHOLE, Batch, NotReady, Payload, Shard, StoreLimits
from rollout_server.stores.redis_answers import (
    BatchRow,
    EnvJoined,
    Expired,
    Granted,
    Nacked,
    RecordRow,
    Records,
    RunFacts,
    StatusFacts,
)
from rollout_server.stores.redis_link import ORPHAN_TTL_S, RedisLink
from rollout_server.stores.redis_plan import Leased, plan_on
from rollout_server.stores.redis_server import check_server
from rollout_server.stores.redis_wakeups import Wakeups

log = logging.getLogger(__name__)

T = TypeVar("T")

CALL_S = 10.0
"""For a call with all its attempts; a restart of Redis takes less."""
BIND_ATTEMPTS = 8
RECORDS_A_CALL = 2000
NO_LIMIT = 1 << 53
"""Lua counts exactly up to here."""
ENV_IDS = range(-(1 << 31), 1 << 31)


class PayloadLostError(AtroposError):
    """Redis no longer holds a payload that it had confirmed."""

    code = "payload_lost"


class RedisStore:
    """See stores.base.Store. Made by `open`."""

    def __init__(
        self, link: RedisLink, limits: StoreLimits, *, clock: Callable[[], float] | None, deadline_s: float
    ) -> None:
        self.on_capacity: Callable[[], None] = lambda: None
        self.on_queue: Callable[[], None] = lambda: None
        self.on_event: Callable[[str, str], None] = lambda kind, text: None
        self._link = link
        self._limits = limits
        self._clock = clock
        self._deadline_s = deadline_s
        self._retain_bytes = NO_LIMIT if limits.retain_bytes < 0 else limits.retain_bytes
        self._wakeups = Wakeups(
            link.redis,
            link.namespace,
            on_capacity=lambda: self.on_capacity(),
            on_queue=lambda: self.on_queue(),
            on_event=lambda kind, text: self.on_event(kind, text),
        )

    @classmethod
    async def open(
        cls,
        url: str,
        limits: StoreLimits,
        *,
        namespace: str = "atropos",
        clock: Callable[[], float] | None = None,
        deadline_s: float = CALL_S,
    ) -> Self:
        """Go on with the run in this namespace of a Redis, or begin there.

        Args:
            clock: Unix time in seconds; None for the clock of Redis, the same for every server.
            deadline_s: for each call, with its repetitions while Redis is away.
        Raises:
            ConfigError: the Redis cannot be used: its address, password, version, or data of a newer server.
        """
        link = RedisLink(url, namespace, deadline_s=deadline_s)
        store = cls(link, limits, clock=clock, deadline_s=deadline_s)
        try:
            await check_server(link)
            await store._wakeups.start(deadline_s=deadline_s)
        except (StoreUnavailableError, TimeoutError) as error:
            await store.close()
            raise ConfigError(f"redis_url does not work: {error or 'no answer to SUBSCRIBE'}") from error
        except BaseException:
            await store.close()
            raise
        return store

    async def _run(self, script: str, answer: type[T], **facts: object) -> T:
        return await self._link.run(script, answer, self._with_now(facts))

    def _with_now(self, facts: dict[str, object]) -> dict[str, object]:
        return facts if self._clock is None else {**facts, "now_ms": round(self._clock() * 1000)}

    @property
    def _ttl_ms(self) -> int:
        return round(self._limits.ticket_ttl_s * 1000)

    @property
    def _env_timeout_ms(self) -> int:
        return round(self._limits.env_timeout_s * 1000)

    # The run and its trainer

    async def open_run(self, request: RunRequest) -> RunInfo:
        """See Store.open_run."""
        facts = request.model_dump(
            include={
                "run_name", "batch_size", "max_staleness", "late_policy", "max_token_len", "num_steps", "start_step",
                "group_size",
            }
        )  # fmt: skip
        run = await self._run("open_run", RunFacts, request=request.model_dump_json(), run_id=uuid.uuid4().hex, **facts)
        return run.info()

    async def close_run(self) -> None:
        """See Store.close_run."""
        try:
            run = await self.run_info()
        except NoRunError:
            return
        await self._run("close_run", type(None), run_id=run.run_id)

    async def run_info(self) -> RunInfo:
        """See Store.run_info."""
        return (await self._run("run_info", RunFacts)).info()

    async def renew_trainer(self, session: int) -> None:
        """See Store.renew_trainer."""
        await self._run("renew_trainer", type(None), session=session)

    async def set_policy(self, policy_version: int, session: int) -> None:
        """See Store.set_policy."""
        await self._run("set_policy", type(None), session=session, policy_version=policy_version)

    # Environments and inference servers

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """See Store.register_env."""
        joined = await self._run(
            "register_env",
            EnvJoined,
            name=request.name,
            group_size=request.group_size,
            weight=request.weight,
            minimum=request.min_batch_allocation or 0.0,
            request=request.model_dump_json(),
        )
        return EnvInfo(env_id=joined.env_id, session=joined.session, run=joined.run.info())

    async def touch_env(self, env_id: int) -> bool:
        """See Store.touch_env."""
        return await self._run("touch_env", bool, env_id=env_id)

    async def disconnect_env(self, env_id: int) -> bool:
        """See Store.disconnect_env."""
        return await self._run("disconnect_env", bool, env_id=env_id)

    async def register_server(self, server: InferenceServer) -> None:
        """See Store.register_server."""
        await self._run("register_server", type(None), url=server.url, server=server.model_dump_json())

    async def remove_server(self, url: str) -> bool:
        """See Store.remove_server."""
        return await self._run("remove_server", bool, url=url)

    # Tickets

    async def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """See Store.grant_tickets."""
        nonce = uuid.uuid4().hex[:28]
        answer = await self._run(
            "grant_tickets",
            Granted,
            env_id=request.env_id,
            session=request.session,
            sequences=request.sequences,
            count=request.count,
            nonce=nonce,
            ttl_ms=self._ttl_ms,
            env_timeout_ms=self._env_timeout_ms,
        )
        tickets = [
            Ticket(
                ticket=f"{nonce}{index:04x}",
                policy_version=answer.policy_version,
                deadline_s=self._limits.ticket_ttl_s,
            )
            for index in range(answer.granted)
        ]
        return TicketGrant(
            tickets=tickets,
            policy_version=answer.policy_version,
            step=answer.step,
            is_finished=answer.is_finished,
        )

    async def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.renew_tickets."""
        return await self._run(
            "renew_tickets",
            list[str],
            env_id=update.env_id,
            session=update.session,
            tickets=update.tickets,
            ttl_ms=self._ttl_ms,
        )

    async def return_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.return_tickets."""
        return await self._run(
            "return_tickets",
            list[str],
            env_id=update.env_id,
            session=update.session,
            tickets=update.tickets,
            reason=update.reason or "unused",
        )

    async def expire_tickets(self) -> int:
        """See Store.expire_tickets. Also a turn at deleting what is not retained."""
        expired, has_more = 0, True
        while has_more:
            sweep = await self._run("expire_tickets", Expired, ttl_ms=self._ttl_ms)
            expired, has_more = expired + sweep.expired, sweep.has_more
        if max(sweep.released_bytes, sweep.archive_bytes) > self._retain_bytes:
            await self._run("trim", bool, retain_bytes=self._retain_bytes)
        return expired

    # Groups

    async def append(self, blobs: Sequence[Blob], *, is_strict: bool = True) -> list[GroupResult]:
        """See Store.append."""
        nonce = uuid.uuid4().hex
        names = [f"{nonce}-{index}" for index in range(len(blobs))]
        facts = self._with_now(
            {
                "groups": [_facts(blob, name) for blob, name in zip(blobs, names, strict=True)],
                "is_strict": is_strict,
                "max_queued_bytes": self._limits.max_queued_bytes,
            }
        )
        payloads = [(name, blob.data) for name, blob in zip(names, blobs, strict=True)]
        try:
            results = await self._link.run("append", list[tuple[str, ...]], facts, payloads)
        except OutOfMemoryError as error:
            await self._make_room()
            raise QueueFullError(
                f"Redis at {self._link.address} is over its maxmemory; try again later, and raise maxmemory, or lower"
                " max_queued_bytes and retain_bytes"
            ) from error
        except StoreUnavailableError:
            raise
        except AtroposError:
            await self._forget(names)
            raise
        return [
            GroupResult.model_validate(
                {"group_id": blob.header.group_id, "status": status, "reason": reason[0] if reason else None}
            )
            for blob, (status, *reason) in zip(blobs, results, strict=True)
        ]

    async def _forget(self, payloads: Sequence[str]) -> None:
        try:
            await self._run("forget", type(None), payloads=payloads)
        except StoreUnavailableError as error:
            log.info("payloads of a refused request stay for up to %d s: %s", ORPHAN_TTL_S, error)

    async def _make_room(self) -> None:
        """What is only retained goes before new groups are refused for good."""
        if self._limits.retain_bytes >= 0:
            await self._run("trim", bool, retain_bytes=0)

    async def known(self, group_ids: Sequence[str]) -> set[str]:
        """See Store.known."""
        return set(await self._run("known", list[str], group_ids=list(group_ids)))

    async def records(self, after: int = 0, limit: int = 10_000) -> GroupRecords:
        """See Store.records."""
        rows: list[RecordRow] = []
        last_key = after + 1
        while len(rows) < limit and after + len(rows) < last_key:
            part = await self._run(
                "records", Records, after=after + len(rows), limit=min(RECORDS_A_CALL, limit - len(rows))
            )
            rows, last_key = rows + part.rows, part.last_key
        last_shown = after + len(rows)
        return GroupRecords(records=[row.record() for row in rows], next=last_shown if last_shown < last_key else None)

    async def latest_group(self) -> Payload | None:
        """See Store.latest_group."""
        name = await self._run("latest_group", str)
        return (await self._link.read([(name, 0)]))[0] if name else None

    # Batches

    async def lease(self, step: int, session: int, shard: Shard = WHOLE) -> Batch | NotReady:
        """See Store.lease."""
        for _ in range(BIND_ATTEMPTS):
            answer = await self._run(
                "lease",
                Leased,
                step=step,
                session=session,
                search_window=SEARCH_WINDOW,
                env_timeout_ms=self._env_timeout_ms,
                allocation_wait_ms=round(self._limits.allocation_wait_s * 1000),
            )
            if answer.look is not None:
                plan = plan_on(answer.look, step)
                if isinstance(plan, Wait):
                    return await self._wait(step, plan)
                answer = await self._run(
                    "bind",
                    Leased,
                    step=step,
                    session=session,
                    members=[group.member for group in plan.groups],
                    overfull=None if plan.strands else plan.overfull,
                )
            if answer.batch is not None:
                return await self._read_batch(step, answer.batch, shard)
            if answer.waiting_for is not None:
                return NotReady(answer.waiting_for)
        return NotReady(f"the queue to stand still: {BIND_ATTEMPTS} plans for step {step} were overtaken; ask again")

    async def _wait(self, step: int, wait: Wait) -> NotReady:
        await self._run(
            "note_wait", type(None), step=step, waiting_for=wait.waiting_for, is_for_minimum=wait.is_for_minimum
        )
        return NotReady(wait.waiting_for)

    async def _read_batch(self, step: int, rows: Sequence[BatchRow], shard: Shard) -> Batch:
        if shard.count > 1:
            parts = shard_groups([row.n_tokens for row in rows], shard.count)
            rows = [rows[index] for index in parts[shard.index]]
        payloads = await self._link.read([(row.payload, row.n_bytes) for row in rows])
        found = [payload for payload in payloads if payload is not None]
        if len(found) < len(rows):
            lost = next(row.group_id for row, payload in zip(rows, payloads, strict=True) if payload is None)
            raise PayloadLostError(
                f"{len(rows) - len(found)} payloads of step {step} are gone from Redis, the first of group {lost!r};"
                " POST the step's nack with these group_ids in retire, and see that Redis neither evicts keys nor runs without AOF"
            )
        return Batch(step, found)

    async def nack(self, step: int, request: NackRequest) -> NackResult:
        """See Store.nack."""
        result = await self._run(
            "nack",
            Nacked,
            step=step,
            session=request.session,
            reason=request.reason,
            retire=request.retire,
            nonce=uuid.uuid4().hex,
        )
        return NackResult(requeued=result.requeued, retired=result.retired)

    async def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """See Store.ack."""
        await self._run("ack", type(None), step=step, session=session, policy_version=policy_version)

    async def commit(self, step: int, session: int) -> None:
        """See Store.commit."""
        await self._run("commit", type(None), step=step, session=session)
        while await self._run("trim", bool, retain_bytes=self._retain_bytes):
            pass

    async def status(self) -> Status:
        """See Store.status."""
        return (await self._run("status", StatusFacts)).status()

    async def close(self) -> None:
        """See Store.close."""
        await self._wakeups.close()
        await self._link.close()


def _facts(blob: Blob, payload: str) -> dict[str, object]:
    """What the script decides on."""
    header = blob.header
    if header.env_id not in ENV_IDS:
        raise GroupFormatError(f"group {header.group_id!r} names environment {header.env_id}; ids are 32-bit integers")
    return {
        "group_id": header.group_id,
        "env_id": header.env_id,
        "sequences": blob.n_sequences,
        "tokens": blob.n_tokens,
        "bytes": len(blob.data),
        "longest": int(np.diff(blob.columns["cu_seqlens"]).max()),
        "oldest": header.oldest_version,
        "ticket": header.ticket,
        "run_id": header.run_id,
        "payload": payload,
    }
