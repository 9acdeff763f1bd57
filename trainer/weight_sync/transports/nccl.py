"""Weights over NCCL into vLLM's own `nccl` engine: this process is rank 0, the workers of every server are the others.

Source: vLLM 0.32, vllm/distributed/weight_transfer/nccl_engine.py, packed mode.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import TransferError
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports.base import (
    Calls,
    Member,
    NamedWeights,
    failures,
    post,
    require_time,
    settle,
)
from trainer.weight_sync.transports.buckets import TensorSpec
from trainer.weight_sync.transports.gloo_group import own_address
from trainer.weight_sync.transports.nccl_sender import Meet, Sender, cuda_meeting
from trainer.weight_sync.transports.packed_chunks import chunks_past, columns, specs_of
from trainer.weight_sync.transports.stock_update import put_back_all, put_back_share_s, start_clean, vllm

_T = TypeVar("_T")

PACKED_BUFFERS = 2
"""On the receiving side, each of bucket_bytes and the tensor that exceeds them."""


@dataclass(frozen=True)
class NcclShipment:
    """Weights to be sent, once for every attempt."""

    weights: NamedWeights
    specs: tuple[TensorSpec, ...]
    weight_version: str


class NcclTransport:
    """Rank 0 of one group over the workers of all members. See Transport.

    NCCL knows no deadlines. A transfer that stalls is given up here in time, its thread and communicator abandoned; a server
    whose worker is stuck in it answers no more and has to be restarted. A server that refused the weights gets its old tensors
    back where none have arrived yet, so it may run a mixture of both versions until the next attempt succeeds. Where that is
    too much to lose, `gloo` stages weights and keeps deadlines on both sides.

    Args:
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
        bucket_bytes: of weights sent together; both sides hold two such buffers on the GPU, each larger by one tensor at most.
        dtype: that floating-point weights are converted to, the servers' own.
        meet: replaces CUDA in tests.

    Raises:
        ConfigError: this environment has no CUDA or no vLLM.
    """

    def __init__(
        self, calls: ThreadPoolExecutor, *, bucket_bytes: int, dtype: torch.dtype, meet: Meet | None = None
    ) -> None:
        self._meet = meet or cuda_meeting()
        self._calls = calls
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self._group: NcclGroup | None = None

    def prepare(self, weights: NamedWeights, weight_version: str) -> NcclShipment:
        """Keep what can be gone through only once, and note what will come: the workers must know beforehand."""
        kept = list(weights) if iter(weights) is weights else weights
        return NcclShipment(kept, tuple(specs_of(kept, dtype=self._dtype)), weight_version)

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """See Transport.open. A server that restarted, or met another trainer, reports another version than ours."""
        versions = {member.control.url: member.weight_version for member in members}
        if self._group is None or self._group.versions != versions:
            self.leave()
            deadline = time.monotonic() + timeout_s
            group = NcclGroup(members, self._calls, self._meet, bucket_bytes=self._bucket_bytes, timeout_s=timeout_s)
            try:
                require_time(deadline, Edge.ATTACH)
            except BaseException:
                group.abandon()
                raise
            self._group = group

    def send(self, shipment: NcclShipment, *, timeout_s: float) -> None:
        """See Transport.send."""
        assert self._group is not None
        try:
            self._group.send(shipment, timeout_s=timeout_s)
        except BaseException:
            self._group = None
            raise

    def leave(self) -> None:
        """See Transport.leave."""
        if self._group is not None:
            self._group.abandon()
            self._group = None


class NcclGroup:
    """An open group. Any error leaves it unusable: abandon it and open another.

    Args:
        members: the servers, each with its number of workers.
        calls: runs the HTTP calls that block until rank 0 does its part.
        meet: opens rank 0.
        bucket_bytes: behind which a chunk is cut; both sides must agree.
        timeout_s: until all have met.

    Raises:
        TransferError: the servers did not meet here in time.
    """

    def __init__(
        self, members: Sequence[Member], calls: ThreadPoolExecutor, meet: Meet, *, bucket_bytes: int, timeout_s: float
    ) -> None:
        self._members = list(members)
        self._calls = calls
        self._bucket_bytes = bucket_bytes
        self.versions = {member.control.url: member.weight_version for member in members}
        """What each member ran when it was last heard of, by URL."""
        self._is_fresh = True
        self._sender: Sender | None = None
        deadline = time.monotonic() + timeout_s
        address = own_address([urlsplit(member.control.url).hostname or "" for member in members])
        listener = socket.create_server((address, 0))
        infos = init_infos(members, address=address, port=listener.getsockname()[1], bucket_bytes=bucket_bytes)
        world_size = 1 + sum(member.world_size for member in members)
        joining = self._post(lambda c: c.init_transfer(infos[c.url], timeout_s=time_left(deadline)))
        meeting = in_thread(lambda: meet(listener, address=address, world_size=world_size, timeout_s=timeout_s))
        try:
            self._sender = watch(meeting, joining, deadline=deadline, edge=Edge.ATTACH)
            settle(joining, deadline=deadline, edge=Edge.ATTACH)
        except BaseException:
            listener.close()
            meeting.add_done_callback(_abort_when_met)
            raise

    def send(self, shipment: NcclShipment, *, timeout_s: float) -> None:
        """Bring the weights to every server and make it call them by their version.

        Raises:
            TransferError: a server failed, or `timeout_s` passed.
        """
        put_back_s = put_back_share_s(timeout_s)
        deadline = time.monotonic() + timeout_s - put_back_s
        chunks = chunks_past(shipment.specs, capacity_bytes=self._bucket_bytes)
        sender = self._sender
        assert sender is not None
        start: Callable[[VllmControl], None] = lambda c: c.start_update(timeout_s=time_left(deadline))  # noqa: E731
        if self._is_fresh:
            start = lambda c: start_clean(c, deadline=deadline)  # noqa: E731
        self._is_fresh = False
        receiving: Calls = {}
        try:
            self._all(start, deadline)
            info = columns(shipment.specs)
            receiving = self._post(lambda c: c.update_weights(info, timeout_s=time_left(deadline)))
            sending = in_thread(lambda: sender.broadcast(chunks, shipment.weights))
            watch(sending, receiving, deadline=deadline, edge=Edge.SEND)
            settle(receiving, deadline=deadline, edge=Edge.SEND)
            self._all(lambda c: c.finish_update(shipment.weight_version, timeout_s=time_left(deadline)), deadline)
        except BaseException:
            self.abandon()  # first, so that this side's part is called off
            put_back_all(self._members, receiving, self._calls, timeout_s=put_back_s)
            raise
        self.versions = dict.fromkeys(self.versions, shipment.weight_version)

    def abandon(self) -> None:
        """Leave the group. May be repeated."""
        if self._sender is not None:
            self._sender.abort()
            self._sender = None

    def _all(self, call: Callable[[VllmControl], None], deadline: float) -> None:
        settle(self._post(call), deadline=deadline, edge=Edge.SEND)

    def _post(self, call: Callable[[VllmControl], None]) -> Calls:
        return post(self._calls, self._members, lambda control: call(vllm(control)))


def init_infos(members: Sequence[Member], *, address: str, port: int, bucket_bytes: int) -> dict[str, dict[str, Any]]:
    """Return what each server is told about the group, by URL. Its workers take the ranks from rank_offset on."""
    infos: dict[str, dict[str, Any]] = {}
    world_size = 1 + sum(member.world_size for member in members)
    rank_offset = 1
    for member in members:
        infos[member.control.url] = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "packed": True,
            "packed_buffer_size_bytes": bucket_bytes,
            "packed_num_buffers": PACKED_BUFFERS,
        }
        rank_offset += member.world_size
    return infos


def in_thread(work: Callable[[], _T]) -> Future[_T]:
    """Run the work in a thread of its own, which may be abandoned: it keeps no interpreter from exiting."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="nccl", daemon=True).start()
    return future


def watch(work: Future[_T], calls: Calls, *, deadline: float, edge: Edge) -> _T:
    """Wait for this side's part while the servers do theirs.

    Raises:
        TransferError: a server failed, this side failed, or the deadline passed. What is left is to be abandoned.
    """
    waiting: set[Future[Any]] = {work, *calls.values()}
    while not work.done():
        done, waiting = wait(waiting, time_left(deadline), FIRST_COMPLETED)
        if failed := failures(calls):
            raise TransferError(edge, "", failed)
        if not done:
            raise TransferError(edge, f"NCCL did not end in time; no answer from {_late(calls) or 'NCCL alone'}", {})
    try:
        return work.result()
    except RuntimeError as error:
        # Its own deadline is the same, and may come first.
        late = _late(calls)
        reason = f"{type(error).__name__}: {error}" + (f"; no answer from {late}" if late else "")
        raise TransferError(edge, reason, failures(calls)) from error


def _late(calls: Calls) -> str:
    return ", ".join(url for url, call in calls.items() if not call.done())


def _abort_when_met(meeting: Future[Sender]) -> None:
    if meeting.exception() is None:
        meeting.result().abort()
