"""Rank 0 of one gloo group over the workers of several vLLM servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from urllib.parse import urlsplit

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports import gloo_group
from trainer.weight_sync.transports.base import (
    Calls,
    Member,
    failures,
    post,
    raise_failed,
    require_time,
    settle,
)
from trainer.weight_sync.transports.buckets import Bucket
from trainer.weight_sync.transports.stock_update import vllm

Buckets = Sequence[tuple[Bucket, torch.Tensor]]


class GlooServers:
    """Servers that take weights together. Any error leaves it unusable: close it and make another.

    Args:
        members: the servers, each with its number of workers.
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
    """

    def __init__(self, members: Sequence[Member], calls: ThreadPoolExecutor) -> None:
        self._members = list(members)
        self._calls = calls
        self.versions = {member.control.url: member.weight_version for member in members}
        """What each member ran when it was last heard of, by URL."""
        offsets = accumulate((member.world_size for member in members), initial=1)
        self._rank_offsets = {member.control.url: offset for member, offset in zip(members, offsets, strict=False)}
        self._meeting: gloo_group.Meeting | None = None
        self._sequence = 0
        self._slowest_bytes_per_s: float | None = None

    def meet(self, *, timeout_s: float) -> None:
        """Open the group.

        Raises:
            TransferError: the servers did not meet here in time.
        """
        deadline = time.monotonic() + timeout_s
        world_size = 1 + sum(member.world_size for member in self._members)
        address = gloo_group.own_address([urlsplit(member.control.url).hostname or "" for member in self._members])
        store = gloo_group.host_store(address, timeout_s=timeout_s)
        info = {"master_address": address, "master_port": store.port, "world_size": world_size, "timeout_s": timeout_s}

        def join(control: VllmControl) -> None:
            place = {"rank_offset": self._rank_offsets[control.url]}
            control.init_transfer(info | place, timeout_s=time_left(deadline))

        joining = self._post(join)
        try:
            self._wait_for_all(store, gloo_group.joining_counter, joining, Edge.ATTACH, deadline)
            group = gloo_group.open_rank_0(store, world_size=world_size, address=address, timeout_s=time_left(deadline))
        except RuntimeError as error:
            raise TransferError(Edge.ATTACH, str(error), failures(joining)) from None
        settle(joining, deadline=deadline, edge=Edge.ATTACH)
        self._meeting = (store, group)

    def close(self) -> None:
        """Leave the group. A worker that still waits in it fails at once rather than at its deadline."""
        self._meeting = None

    def send(self, buckets: Buckets, weight_version: str, *, timeout_s: float) -> None:
        """Bring the buckets to every server and make it call them `weight_version`.

        Raises:
            TransferError: a server failed, or `timeout_s` passed. Without a commit the old weights stay.
        """
        deadline = time.monotonic() + timeout_s
        self._all(lambda control: _start_update(control, deadline), deadline)
        for bucket, buffer in buckets:
            self._carry(bucket, buffer, deadline)
        self._all(lambda control: control.update_weights({"commit": True}, timeout_s=time_left(deadline)), deadline)
        self._all(lambda control: control.finish_update(weight_version, timeout_s=time_left(deadline)), deadline)
        self.versions = dict.fromkeys(self.versions, weight_version)

    def _all(self, call: Callable[[VllmControl], None], deadline: float) -> None:
        require_time(deadline, Edge.SEND)
        settle(self._post(call), deadline=deadline, edge=Edge.SEND)

    def _carry(self, bucket: Bucket, buffer: torch.Tensor, deadline: float) -> None:
        require_time(deadline, Edge.SEND)
        store, group = self._met()
        sequence, self._sequence = self._sequence, self._sequence + 1
        limit_s = min(gloo_group.bucket_timeout_s(bucket.size_bytes, self._slowest_bytes_per_s), time_left(deadline))
        info = {
            "sequence": sequence,
            "names": [spec.name for spec in bucket.specs],
            "dtype_names": [spec.dtype_name for spec in bucket.specs],
            "shapes": [list(spec.shape) for spec in bucket.specs],
            "timeout_s": limit_s,
        }
        receiving = self._post(lambda control: control.update_weights(info, timeout_s=time_left(deadline)))
        # A gloo operation cannot be called off, so it starts only when every worker stands ready for it.
        ready_by = min(deadline, time.monotonic() + gloo_group.READY_TIMEOUT_S)
        try:
            self._wait_for_all(
                store, lambda rank: gloo_group.ready_counter(sequence, rank), receiving, Edge.SEND, ready_by
            )
        except RuntimeError as error:
            raise TransferError(Edge.SEND, str(error), failures(receiving)) from None
        store.set(gloo_group.go_key(sequence), "1")
        begun = time.monotonic()
        try:
            gloo_group.broadcast(group, buffer, timeout_s=limit_s).wait()
        except RuntimeError as error:
            raise TransferError(Edge.SEND, str(error), {}) from None
        pace = bucket.size_bytes / max(time.monotonic() - begun, 1e-6)
        self._slowest_bytes_per_s = min(pace, self._slowest_bytes_per_s or pace)
        settle(receiving, deadline=deadline, edge=Edge.SEND)
        for offset in self._rank_offsets.values():
            store.delete_key(gloo_group.ready_counter(sequence, offset))
        store.delete_key(gloo_group.go_key(sequence))

    def _wait_for_all(
        self,
        store: TCPStore,
        counter: Callable[[int], str],
        calls: Calls,
        edge: Edge,
        deadline: float,
    ) -> None:
        begin = time.monotonic()
        expected = {counter(self._rank_offsets[m.control.url]): m.world_size for m in self._members}
        missing = gloo_group.wait_for_workers(store, expected, deadline=deadline, check=lambda: raise_failed(calls))
        if missing:
            reason = f"not all of its workers came within {time.monotonic() - begin:.3g} s"
            urls = [url for url, rank in self._rank_offsets.items() if counter(rank) in missing]
            raise TransferError(edge, reason, {url: ServerSyncError(url, edge, reason) for url in urls})

    def _met(self) -> gloo_group.Meeting:
        if self._meeting is None:
            raise TransferError(Edge.SEND, "the group was given up", {})
        return self._meeting

    def _post(self, call: Callable[[VllmControl], None]) -> Calls:
        return post(self._calls, self._members, lambda control: call(vllm(control)))


def _start_update(control: VllmControl, deadline: float) -> None:
    try:
        control.start_update(timeout_s=time_left(deadline))
    except ServerSyncError:
        # A trainer that died in the middle left its update open. Finishing it before a commit abandons it.
        control.finish_update(None, timeout_s=time_left(deadline))
        control.start_update(timeout_s=time_left(deadline))
