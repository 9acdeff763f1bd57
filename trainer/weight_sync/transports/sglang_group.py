"""Weights over a torch process group, gloo or NCCL: this process is rank 0, the workers of every SGLang server the others.

SGLang loads each bucket as it comes, so a transfer that breaks leaves a mixture of old and new weights. From the first
bucket to the last the servers therefore go by UNKNOWN_VERSION: nobody takes what they sample for a published version's.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar, cast
from urllib.parse import urlsplit

import torch
from torch._C._distributed_c10d import Backend
from torch.distributed import TCPStore, Work  # type: ignore[attr-defined]

from trainer.weight_sync.engines.control import UNKNOWN_VERSION, EngineControl
from trainer.weight_sync.engines.sglang import SglangControl
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.fan_out import on_each
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports import gloo_group, torch_group
from trainer.weight_sync.transports.base import (
    Calls,
    Member,
    NamedWeights,
    failures,
    post,
    require_time,
    settle,
)
from trainer.weight_sync.transports.flat_buckets import FlatBucket, flat_buckets
from trainer.weight_sync.transports.torch_group import GroupBackend

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_MEET_S = 20.0
"""For all ranks to come together. An engine generates nothing while it waits for the others."""
_ON_THE_WAY_S = 0.5
"""For servers that were told to come, when others will not: they come, find that, and generate again."""
_LEAVE_S = 2.0
"""For the servers to leave a group that nobody is stuck in."""
_STALL_S = 30.0
"""After which gloo gives up a bucket that nobody takes, even where the transfer has longer."""
_POLL_S = 0.002


@dataclass(frozen=True)
class SglangShipment:
    """Weights to be sent, once for every attempt."""

    weights: NamedWeights
    weight_version: str


class SglangGroupTransport:
    """Rank 0 of one group over the tensor-parallel workers of all members. See Transport.

    Args:
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
        backend: nccl needs CUDA on both sides, and no two ranks on one GPU.
        bucket_bytes: of weights sent together; this process holds two such buffers.
        dtype: that floating-point weights are converted to, the servers' own.
    """

    def __init__(
        self, calls: ThreadPoolExecutor, *, backend: GroupBackend, bucket_bytes: int, dtype: torch.dtype
    ) -> None:
        self._calls = calls
        self._backend: GroupBackend = backend
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self._group: SglangGroup | None = None

    def prepare(self, weights: NamedWeights, weight_version: str) -> SglangShipment:
        """Keep what can be gone through only once: an attempt may fail."""
        return SglangShipment(list(weights) if iter(weights) is weights else weights, weight_version)

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """See Transport.open. A server that restarted, or met another trainer, reports another version than ours."""
        versions = {member.control.url: member.weight_version for member in members}
        if self._group is None or self._group.is_closed or self._group.versions != versions:
            self.leave()
            self._group = SglangGroup(members, self._calls, backend=self._backend, timeout_s=timeout_s)

    def send(self, shipment: SglangShipment, *, timeout_s: float) -> None:
        """See Transport.send."""
        assert self._group is not None
        device = torch.device("cuda" if self._backend == "nccl" else "cpu")
        buckets = flat_buckets(shipment.weights, capacity_bytes=self._bucket_bytes, dtype=self._dtype, device=device)
        self._group.send(buckets, shipment.weight_version, timeout_s=timeout_s)

    def leave(self) -> None:
        """See Transport.leave."""
        if self._group is not None:
            group, self._group = self._group, None
            group.close()


@dataclass(frozen=True)
class _Travelling:
    receiving: Calls
    works: list[Work]

    def late(self) -> dict[str, ServerSyncError]:
        """Servers that have not taken what others have; none where none has, since they may wait for each other."""
        late = [url for url, call in self.receiving.items() if not call.done()]
        is_theirs = len(late) < len(self.receiving)
        return {url: ServerSyncError(url, Edge.SEND, "no answer in time") for url in late} if is_theirs else {}


class SglangGroup:
    """An open group. Any error leaves it closed: open another.

    Args:
        members: the servers.
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
        timeout_s: until all have met.

    Raises:
        TransferError: the servers did not meet here in time, or one of them cannot join a group.
    """

    def __init__(
        self, members: Sequence[Member], calls: ThreadPoolExecutor, *, backend: GroupBackend, timeout_s: float
    ) -> None:
        self._members = list(members)
        self._calls = calls
        self.versions = {member.control.url: member.weight_version for member in members}
        """What each member ran when it was last heard of, by URL."""
        # A new name for each group: a server that was cut off in the middle may still sit in the last one.
        self._name = f"atropos-{uuid.uuid4().hex[:12]}"
        self._sessions: set[str] = set()
        self._travelling: _Travelling | None = None
        self._store: TCPStore | None = None
        self._group: Backend | None = None
        self.is_closed = False
        try:
            self._group = self._meet(backend, time.monotonic() + min(timeout_s, _MEET_S))
        except BaseException:
            self._part(wait_s=0.0)
            raise

    def send(self, buckets: Iterator[FlatBucket], weight_version: str, *, timeout_s: float) -> None:
        """Bring the buckets to every server and make it call them `weight_version`.

        The next bucket is packed while the last one travels.

        Raises:
            TransferError: a server failed, or `timeout_s` passed. The group is closed then, so that no server stays stuck
                in it, and servers may hold a mixture of weights, which they call UNKNOWN_VERSION.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._name_weights(UNKNOWN_VERSION, deadline)
            self._begin(deadline)
            for bucket in buckets:
                self._arrive(deadline)
                self._depart(bucket, deadline)
            self._arrive(deadline)
            self._end(deadline)
            self._name_weights(weight_version, deadline)
        except BaseException:
            # Before the servers are resumed: one that is stuck in the group does not resume.
            self._part(wait_s=0.0)
            raise
        self.versions = dict.fromkeys(self.versions, weight_version)

    def close(self) -> None:
        """Leave the group and make the servers leave it, once."""
        self._part(wait_s=_LEAVE_S)

    def _meet(self, backend: GroupBackend, deadline: float) -> Backend:
        ranks = self._all(lambda control: control.group_ranks(timeout_s=time_left(deadline)), deadline, Edge.ATTACH)
        world_size = 1 + sum(ranks.values())
        offsets = dict(zip(ranks, accumulate(ranks.values(), initial=1), strict=False))
        address = gloo_group.own_address([urlsplit(url).hostname or "" for url in ranks])
        # Held by nothing else, a traceback's frame included: dropping it frees whoever waits for ranks that do not come.
        self._store = gloo_group.host_store(address, timeout_s=time_left(deadline))
        port = self._store.port
        group = {
            "master_address": address,
            "master_port": port,
            "world_size": world_size,
            "group_name": self._name,
            "backend": backend,
        }

        def join(control: EngineControl) -> None:
            body = {**group, "rank_offset": offsets[control.url]}
            _sglang(control).init_group(body, timeout_s=time_left(deadline))

        joining = post(self._calls, self._members, join)
        opening = torch_group.begin_to_open(
            port,
            backend=backend,
            group_name=self._name,
            world_size=world_size,
            address=address,
            timeout_s=time_left(deadline),
        )
        return self._met(opening, joining, deadline)

    def _met(self, opening: Future[Backend], joining: Calls, deadline: float) -> Backend:
        while not opening.done():
            if failed := failures(joining):
                raise TransferError(Edge.ATTACH, "", failed)
            require_time(deadline, Edge.ATTACH)
            wait([opening], timeout=_POLL_S)
        try:
            group = opening.result()
        except RuntimeError as error:
            raise TransferError(Edge.ATTACH, f"the ranks did not meet: {error}", failures(joining)) from None
        settle(joining, deadline=deadline, edge=Edge.ATTACH)
        return group

    def _begin(self, deadline: float) -> None:
        sessions = self._all(lambda control: _begin_update(control, deadline), deadline, Edge.SEND)
        self._sessions = {url for url, has_session in sessions.items() if has_session}

    def _end(self, deadline: float) -> None:
        def end(control: SglangControl) -> None:
            if control.url in self._sessions:
                control.end_update(timeout_s=time_left(deadline))

        self._all(end, deadline, Edge.SEND)
        self._sessions = set()

    def _name_weights(self, weight_version: str, deadline: float) -> None:
        self._all(
            lambda control: control.name_version(weight_version, timeout_s=time_left(deadline)),
            deadline,
            Edge.SEND,
        )

    def _depart(self, bucket: FlatBucket, deadline: float) -> None:
        require_time(deadline, Edge.SEND)
        assert self._group is not None
        # A server without sessions is too old to be trusted with flat buckets: it might ignore the format and hang.
        is_flat = len(self._sessions) == len(self._members)
        update = {
            "names": [spec.name for spec in bucket.specs],
            "dtypes": [spec.dtype_name for spec in bucket.specs],
            "shapes": [list(spec.shape) for spec in bucket.specs],
            "group_name": self._name,
            "load_format": "flattened_bucket" if is_flat else None,
        }
        receiving = post(
            self._calls,
            self._members,
            lambda control: _sglang(control).update_from_group(update, timeout_s=time_left(deadline)),
        )
        limit_s = min(time_left(deadline), _STALL_S)
        parts = [bucket.flat] if is_flat else bucket.parts()
        works: list[Work] = []
        self._travelling = _Travelling(receiving, works)
        problem: str | None = None
        try:
            works.extend(torch_group.broadcast(self._group, part, timeout_s=limit_s) for part in parts)
        except RuntimeError as error:
            # gloo notices a peer that is gone when it is called, not only when it is waited for.
            problem = str(error)
        if problem is not None:
            # Not from within: the error's frames hold the group, and what waits for it would wait on.
            raise TransferError(Edge.SEND, problem, failures(receiving))

    def _arrive(self, deadline: float) -> None:
        if self._travelling is None:
            return
        for work in self._travelling.works:
            while not work.is_completed():
                if failed := failures(self._travelling.receiving):
                    raise TransferError(Edge.SEND, "", failed)
                if time.monotonic() > deadline and (late := self._travelling.late()):
                    raise TransferError(Edge.SEND, "another server did not take a bucket", late)
                require_time(deadline, Edge.SEND)
                time.sleep(_POLL_S)
            try:
                work.wait()
            except RuntimeError as error:
                raise TransferError(Edge.SEND, str(error), {}) from None
        settle(self._travelling.receiving, deadline=deadline, edge=Edge.SEND)
        self._travelling = None

    def _part(self, *, wait_s: float) -> None:
        """Close this side, which frees servers that wait for it, then make each leave, which frees those that wait for each
        other. Nobody waits longer than `wait_s` for that.
        """
        if self.is_closed:
            return
        self.is_closed = True
        if self._group is not None:
            torch_group.bury(self._group, [] if self._travelling is None else self._travelling.works)
        elif self._store is not None:
            torch_group.drop_later(self._store, after_s=_ON_THE_WAY_S)
        self._group = self._store = None
        wait(post(self._calls, self._members, self._make_leave).values(), timeout=wait_s)

    def _make_leave(self, control: EngineControl) -> None:
        server = _sglang(control)
        if server.url in self._sessions:
            with suppress(ServerSyncError):
                server.end_update(timeout_s=_STALL_S)
        try:
            server.destroy_group(self._name, timeout_s=_STALL_S)
        except ServerSyncError as error:
            log.debug("group %s is not gone: %s", self._name, error)

    def _all(self, call: Callable[[SglangControl], _T], deadline: float, edge: Edge) -> dict[str, _T]:
        """Make the call on every server and return the answers by URL, in the order of the members."""
        require_time(deadline, edge)
        answers, errors = on_each(
            self._calls,
            [member.control for member in self._members],
            lambda control: call(_sglang(control)),
            edge=edge,
            timeout_s=time_left(deadline),
        )
        if errors:
            raise TransferError(edge, "", errors)
        return answers


def _begin_update(control: SglangControl, deadline: float) -> bool:
    try:
        return control.begin_update(timeout_s=time_left(deadline))
    except ServerSyncError as refusal:
        # A trainer that died in the middle may have left its session open.
        try:
            control.end_update(timeout_s=time_left(deadline))
        except ServerSyncError as error:
            raise ServerSyncError(control.url, Edge.SEND, f"{refusal.reason}; {error.reason}") from None
        return control.begin_update(timeout_s=time_left(deadline))


def _sglang(control: EngineControl) -> SglangControl:
    """Weight update groups are SGLang's own."""
    return cast(SglangControl, control)
