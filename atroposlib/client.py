"""The one HTTP client of the rollout server, shared by environments and trainer.

Every call has a deadline. Connection errors, 429 and 5xx are tried again with growing pauses until it is over; that is
safe because each call may be repeated: groups carry ids, batches are named by step, tickets by their own id.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter

from atroposlib.errors import AtroposError, NoBatchError, ServerUnreachableError, error_from_wire
from atroposlib.wire.columns import Group, decode_groups, encode_group
from atroposlib.wire.event_stream import parse_events
from atroposlib.wire.models import (
    AckRequest,
    CommitRequest,
    Diagnosis,
    EnvInfo,
    EnvRequest,
    Event,
    GroupRecord,
    GroupRecords,
    GroupResult,
    GroupsResult,
    InferenceServer,
    InferenceServerLeave,
    InferenceServerStatus,
    LeaseRequest,
    LeaseWait,
    NackRequest,
    NackResult,
    PolicyUpdate,
    RunInfo,
    RunRequest,
    Status,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
    TicketUpdateResult,
    TrainerRenewal,
)

log = logging.getLogger(__name__)

GROUPS_MEDIA_TYPE = "application/vnd.atropos.groups"
MAX_PAUSE_S = 5.0
TOKEN_VARIABLE = "ATROPOS_TOKEN"
EVENTS_SILENCE_S = 45.0
"""The server says something in a stream of events at least every 15 s; a stream silent for this long is dead."""

REQUEST_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0

M = TypeVar("M", bound=BaseModel)


class RolloutClient:
    """Talks to one rollout server; use as ``async with RolloutClient(url) as client``.

    Args:
        url: base URL, e.g. http://localhost:8000.
        deadline_s: how long a call keeps trying before ServerUnreachableError.
        token: bearer token, where the server asks for one; by default what ATROPOS_TOKEN holds in the environment.
    """

    def __init__(self, url: str, *, deadline_s: float = 60.0, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.deadline_s = deadline_s
        token = token or os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=httpx.Timeout(30.0, connect=5.0))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # Trainer

    async def open_run(self, request: RunRequest) -> RunInfo:
        """Open a run, or take over the one of the same name."""
        return await self._post("/v1/run", request, RunInfo)

    async def renew_trainer(self, session: int) -> None:
        """Say that the trainer lives, though its step takes long. Every other call of the trainer says so too."""
        await self._send("POST", "/v1/run/renew", json=TrainerRenewal(session=session).model_dump())

    async def lease(
        self, step: int, *, session: int, deadline_s: float, shard: int = 0, n_shards: int = 1
    ) -> list[Group]:
        """The batch of a step, or one rank's part of it; waits for it.

        Args:
            shard: which of n_shards parts; every part holds whole groups, maybe none.

        Raises:
            NoBatchError: none came within deadline_s; the text says what the server waits for.
            FencedError: a newer trainer took over.
        """
        end = time.monotonic() + deadline_s
        while True:
            wait_s = max(0.0, min(20.0, end - time.monotonic()))
            body = LeaseRequest(session=session, wait_s=wait_s, shard=shard, n_shards=n_shards)
            response = await self._send(
                "POST", f"/v1/batches/{step}/lease", json=body.model_dump(), timeout_s=wait_s + 30.0
            )
            if response.status_code == 200:
                return decode_groups(response.content)
            waiting_for = LeaseWait.model_validate_json(response.content).waiting_for
            if time.monotonic() >= end:
                raise NoBatchError(
                    f"no batch for step {step} within {deadline_s:.0f} s: {waiting_for}", waiting_for=waiting_for
                )

    async def ack(self, step: int, *, session: int, policy_version: int | None) -> None:
        """Say that step's optimizer step used its batch."""
        body = AckRequest(session=session, policy_version=policy_version)
        await self._send("POST", f"/v1/batches/{step}/ack", json=body.model_dump())

    async def nack(self, step: int, *, session: int, reason: str, retire: Sequence[str] = ()) -> NackResult:
        """Give a batch back that cannot be used; those of its groups named in retire never come again."""
        body = NackRequest(session=session, reason=reason, retire=list(retire))
        return await self._post(f"/v1/batches/{step}/nack", body, NackResult)

    async def commit(self, step: int, *, session: int) -> None:
        """Say that a checkpoint holds the weights after `step` steps."""
        await self._send("POST", "/v1/commit", json=CommitRequest(session=session, step=step).model_dump())

    async def publish_policy(self, policy_version: int, *, session: int) -> None:
        """Register the version that the inference servers report."""
        body = PolicyUpdate(session=session, policy_version=policy_version)
        await self._send("POST", "/v1/policy", json=body.model_dump())

    # Environments

    async def run_info(self) -> RunInfo:
        """The run that is open.

        Raises:
            NoRunError: no trainer has registered.
        """
        return await self._get("/v1/run", RunInfo)

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """Join the run, or rejoin it under the same name.

        Raises:
            NoRunError: no trainer has registered.
        """
        return await self._post("/v1/envs", request, EnvInfo)

    async def request_tickets(self, request: TicketRequest) -> TicketGrant:
        """Long-poll for leave to start groups."""
        return await self._post("/v1/tickets", request, TicketGrant, timeout_s=request.wait_s + 30.0)

    async def renew_tickets(self, update: TicketUpdate) -> TicketUpdateResult:
        """Move the deadlines of tickets whose rollouts are alive."""
        return await self._post("/v1/tickets/renew", update, TicketUpdateResult)

    async def return_tickets(self, update: TicketUpdate) -> TicketUpdateResult:
        """Give tickets back unused, with the reason."""
        return await self._post("/v1/tickets/return", update, TicketUpdateResult)

    async def post_groups(self, groups: Sequence[Group]) -> list[GroupResult]:
        """Deliver groups; a repeated call is answered as duplicates."""
        body = b"".join(encode_group(group) for group in groups)
        response = await self._send("POST", "/v1/groups", content=body, headers={"Content-Type": GROUPS_MEDIA_TYPE})
        return GroupsResult.model_validate_json(response.content).results

    # Anyone

    async def status(self) -> Status:
        """Counters of queue, tickets, environments and trainer."""
        return await self._get("/v1/status", Status)

    async def register_server(self, server: InferenceServer) -> None:
        """Say that an inference server is there, or is there still."""
        await self._send("POST", "/v1/servers", json=server.model_dump())

    async def remove_server(self, url: str) -> None:
        """Say that an inference server is gone."""
        await self._send("POST", "/v1/servers/leave", json=InferenceServerLeave(url=url).model_dump())

    async def servers(self) -> list[InferenceServerStatus]:
        """The registry of inference servers."""
        response = await self._send("GET", "/v1/servers")
        return TypeAdapter(list[InferenceServerStatus]).validate_json(response.content)

    async def diagnosis(self) -> Diagnosis:
        """What is wrong with the run, each with its fix."""
        return await self._get("/v1/doctor", Diagnosis)

    async def record_page(self, *, after: int = 0, limit: int = 10_000) -> GroupRecords:
        """A page of the server's ledger: where each group of the run is, in order of arrival."""
        return await self._get(f"/v1/groups?after={after}&limit={limit}", GroupRecords)

    async def group_records(self) -> list[GroupRecord]:
        """Where every group of the run is: the server's whole ledger."""
        records: list[GroupRecord] = []
        after: int | None = 0
        while after is not None:
            page = await self.record_page(after=after)
            records += page.records
            after = page.next
        return records

    async def events(self, *, after: int = 0, follow: bool = True) -> AsyncGenerator[Event]:
        """What happens, as it happens; connects again where it was. Close it with contextlib.aclosing.

        Args:
            after: only events behind this id.
            follow: False ends after the events that are there.

        Raises:
            ServerUnreachableError: no connection for deadline_s.
        """
        timeout = httpx.Timeout(EVENTS_SILENCE_S, connect=5.0)
        pause_s = min(1.0, self.deadline_s / 4)
        lost_at: float | None = None
        while True:
            parameters = {"after": after, "follow": follow}
            try:
                async with self._http.stream("GET", "/v1/events", params=parameters, timeout=timeout) as response:
                    await _check_stream(response)
                    lost_at = None
                    async for event in parse_events(response.aiter_lines()):
                        after = event.id
                        yield event
                    if not follow:
                        return
            except (httpx.TransportError, _TryAgainError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() + pause_s > lost_at + self.deadline_s:
                    raise ServerUnreachableError(
                        f"rollout server {self.url} did not answer GET /v1/events within {self.deadline_s:.0f} s"
                        f" (last: {type(error).__name__}: {error}); is it running?"
                    ) from error
            await asyncio.sleep(pause_s)

    async def _get(self, path: str, answer: type[M]) -> M:
        response = await self._send("GET", path)
        return answer.model_validate_json(response.content)

    async def _post(self, path: str, body: BaseModel, answer: type[M], *, timeout_s: float | None = None) -> M:
        response = await self._send("POST", path, json=body.model_dump(), timeout_s=timeout_s)
        return answer.model_validate_json(response.content)

    async def _send(self, method: str, path: str, *, timeout_s: float | None = None, **kwargs: Any) -> httpx.Response:
        timeout_s = timeout_s or min(REQUEST_TIMEOUT_S, self.deadline_s)
        # A long-poll may wait beyond the deadline: it is the server that waits then.
        end = time.monotonic() + max(self.deadline_s, timeout_s)
        pause_s, tries = 0.1, 0
        while True:
            tries += 1
            problem: str
            try:
                response = await self._http.request(
                    method, path, timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)), **kwargs
                )
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                pause_s = min(pause_s * 2, MAX_PAUSE_S)
            else:
                if response.is_success:
                    return response
                if not _may_pass(response.status_code):
                    raise _error_of(response)
                problem = f"HTTP {response.status_code} {response.text[:200]}"
                pause_s = min(_retry_after_s(response) or pause_s * 2, MAX_PAUSE_S)
            if time.monotonic() + pause_s > end:
                raise ServerUnreachableError(
                    f"rollout server {self.url} did not answer {method} {path} within {max(self.deadline_s, timeout_s):g} s"
                    f" ({tries} tries, last: {problem}); is it running?"
                )
            if tries == 1:
                log.warning("rollout server does not answer, trying on: %s %s: %s", method, path, problem)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))


class _TryAgainError(Exception):
    """An answer that another try may better."""


async def _check_stream(response: httpx.Response) -> None:
    if response.is_success:
        return
    await response.aread()
    if not _may_pass(response.status_code):
        raise _error_of(response)
    raise _TryAgainError(f"HTTP {response.status_code} {response.text[:200]}")


def _may_pass(status: int) -> bool:
    """Whether another try may better an answer: the server is busy or ill, or the body came too slowly."""
    return status >= 500 or status in (408, 429)


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds of Retry-After; None where there are none, or a date, as proxies send."""
    stated = response.headers.get("Retry-After", "")
    return float(stated) if stated.isdigit() else None


def _error_of(response: httpx.Response) -> AtroposError:
    try:
        body = response.json()
        code, detail = str(body["code"]), str(body["detail"])
    except (ValueError, KeyError, TypeError):
        code, detail = "", f"HTTP {response.status_code}: {response.text[:500]}"
    return error_from_wire(code, detail, response.status_code)
