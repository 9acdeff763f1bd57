"""Weights over a gloo group: this process is rank 0, the workers of every vLLM server are the others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import torch
from torch.distributed import Work

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports import gloo_group
from trainer.weight_sync.transports.base import (
    Calls,
    Member,
    NamedWeights,
    failures,
    post,
    raise_failed,
    settle,
    time_left,
)
from trainer.weight_sync.transports.buckets import Bucket, TensorSpec, plan_buckets


@dataclass(frozen=True)
class GlooShipment:
    """Weights to be sent, once for every attempt."""

    weights: NamedWeights
    weight_version: str


class GlooTransport:
    """Rank 0 of one group over the workers of all members. See Transport.

    Args:
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
        bucket_bytes: of weights sent together; this process holds two such buffers.
        dtype: that floating-point weights are converted to, the servers' own.
    """

    def __init__(self, calls: ThreadPoolExecutor, *, bucket_bytes: int, dtype: torch.dtype) -> None:
        self._calls = calls
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self._group: GlooGroup | None = None

    def prepare(self, weights: NamedWeights, weight_version: str) -> GlooShipment:
        """Keep what can be gone through only once: an attempt may fail."""
        return GlooShipment(list(weights) if iter(weights) is weights else weights, weight_version)

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """See Transport.open. A server that restarted, or met another trainer, reports another version than ours."""
        versions = {member.control.url: member.weight_version for member in members}
        if self._group is None or self._group.versions != versions:
            self.leave()
            self._group = GlooGroup(members, self._calls, timeout_s=timeout_s)

    def send(self, shipment: GlooShipment, *, timeout_s: float) -> None:
        """See Transport.send."""
        assert self._group is not None
        buckets = packed_buckets(shipment.weights, capacity_bytes=self._bucket_bytes, dtype=self._dtype)
        self._group.send(buckets, shipment.weight_version, timeout_s=timeout_s)

    def leave(self) -> None:
        """See Transport.leave."""
        if self._group is not None:
            self._group.close()
            self._group = None


class GlooGroup:
    """An open group. Any error leaves it unusable: close it and open another.

    Args:
        members: the servers, each with its number of workers.
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
        timeout_s: until all have met, and for each operation on the group later.

    Raises:
        TransferError: the servers did not meet here in time.
    """

    def __init__(self, members: Sequence[Member], calls: ThreadPoolExecutor, *, timeout_s: float) -> None:
        self._members = list(members)
        self._calls = calls
        self.versions = {member.control.url: member.weight_version for member in members}
        """What each member ran when it was last heard of, by URL."""
        self._sequence = 0
        self._workers = sum(member.world_size for member in members)
        address = _own_address([member.control for member in members])
        self._store = gloo_group.host_store(address, timeout_s=timeout_s)
        deadline = time.monotonic() + timeout_s
        rank_offsets = {}
        rank = 1
        for member in members:
            rank_offsets[member.control.url] = rank
            rank += member.world_size

        def join(control: EngineControl) -> None:
            info = {
                "master_address": address,
                "master_port": self._store.port,
                "rank_offset": rank_offsets[control.url],
                "world_size": 1 + self._workers,
                "timeout_s": timeout_s,
            }
            _vllm(control).init_transfer(info, timeout_s=timeout_s)

        joining = post(self._calls, members, join)
        try:
            gloo_group.wait_for_count(
                self._store,
                gloo_group.JOINING,
                self._workers,
                deadline=deadline,
                check=lambda: raise_failed(joining),
            )
            self._group = gloo_group.open_group(
                self._store, rank=0, world_size=1 + self._workers, address=address, timeout_s=timeout_s
            )
        except (RuntimeError, TimeoutError) as error:
            raise TransferError(Edge.ATTACH, str(error), failures(joining)) from error
        settle(joining, deadline=deadline, edge=Edge.ATTACH)

    def close(self) -> None:
        """Leave the group, once. A worker that still waits in it fails at once rather than at its deadline."""
        del self._group, self._store

    def send(self, buckets: Iterator[tuple[Bucket, torch.Tensor]], weight_version: str, *, timeout_s: float) -> None:
        """Bring the buckets to every server and make it call them `weight_version`.

        The next bucket is packed while the last one travels.

        Raises:
            TransferError: a server failed, or `timeout_s` passed. Without a commit the old weights stay.
        """
        deadline = time.monotonic() + timeout_s
        self._all(lambda control: _start_update(control, deadline), deadline)
        travelling: _Travelling | None = None
        for bucket, buffer in buckets:
            if travelling is not None:
                self._arrive(travelling, deadline)
            travelling = self._depart(bucket, buffer, deadline)
        if travelling is not None:
            self._arrive(travelling, deadline)
        self._all(lambda control: control.update_weights({"commit": True}, timeout_s=time_left(deadline)), deadline)
        self._all(lambda control: control.finish_update(weight_version, timeout_s=time_left(deadline)), deadline)
        self.versions = dict.fromkeys(self.versions, weight_version)

    def _all(self, call: Callable[[VllmControl], None], deadline: float) -> None:
        settle(self._post(call), deadline=deadline, edge=Edge.SEND)

    def _depart(self, bucket: Bucket, buffer: torch.Tensor, deadline: float) -> _Travelling:
        sequence, self._sequence = self._sequence, self._sequence + 1
        info = {
            "sequence": sequence,
            "names": [spec.name for spec in bucket.specs],
            "dtype_names": [spec.dtype_name for spec in bucket.specs],
            "shapes": [list(spec.shape) for spec in bucket.specs],
        }
        receiving = self._post(lambda control: control.update_weights(info, timeout_s=time_left(deadline)))
        # A gloo operation cannot be called off, so it starts only when every worker stands ready for it.
        counter = gloo_group.bucket_counter(sequence)
        try:
            gloo_group.wait_for_count(
                self._store, counter, self._workers, deadline=deadline, check=lambda: raise_failed(receiving)
            )
        except (RuntimeError, TimeoutError) as error:
            raise TransferError(Edge.SEND, str(error), failures(receiving)) from error
        self._store.delete_key(counter)
        return _Travelling(gloo_group.broadcast(self._group, buffer, timeout_s=time_left(deadline)), receiving)

    def _arrive(self, travelling: _Travelling, deadline: float) -> None:
        try:
            travelling.work.wait()
        except RuntimeError as error:
            raise TransferError(Edge.SEND, str(error), {}) from error
        settle(travelling.receiving, deadline=deadline, edge=Edge.SEND)

    def _post(self, call: Callable[[VllmControl], None]) -> Calls:
        return post(self._calls, self._members, lambda control: call(_vllm(control)))


@dataclass(frozen=True)
class _Travelling:
    work: Work
    receiving: Calls


def packed_buckets(
    weights: NamedWeights, *, capacity_bytes: int, dtype: torch.dtype
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Yield buckets of weights, floating-point ones converted to `dtype`, each with its flat uint8 buffer.

    Two buffers take turns: one that was yielded stays as it is until the one after the next is asked for.
    """
    held: deque[torch.Tensor] = deque()

    def specs() -> Iterator[TensorSpec]:
        for name, tensor in weights:
            held.append(tensor)
            sent_as = dtype if tensor.is_floating_point() else tensor.dtype
            yield TensorSpec(name, str(sent_as).removeprefix("torch."), tuple(tensor.shape))

    buffers = deque([torch.empty(0, dtype=torch.uint8)] * 2)
    for bucket in plan_buckets(specs(), capacity_bytes=capacity_bytes):
        buffers.rotate()
        if buffers[0].numel() < bucket.size_bytes:
            buffers[0] = torch.empty(max(bucket.size_bytes, capacity_bytes), dtype=torch.uint8)
        buffer = buffers[0][: bucket.size_bytes]
        for slot in bucket.slots:
            place = buffer[slot.offset_bytes : slot.end_bytes].view(getattr(torch, slot.spec.dtype_name))
            place.view(slot.spec.shape).copy_(held.popleft().detach())
        yield bucket, buffer


def _start_update(control: VllmControl, deadline: float) -> None:
    try:
        control.start_update(timeout_s=time_left(deadline))
    except ServerSyncError:
        # A trainer that died in the middle left its update open. Finishing it before a commit abandons it.
        control.finish_update(None, timeout_s=time_left(deadline))
        control.start_update(timeout_s=time_left(deadline))


def _own_address(controls: Sequence[EngineControl]) -> str:
    """Return an address of this machine that every server reaches: loopback only if all are here."""
    seen = [gloo_group.local_address_towards(urlsplit(control.url).hostname or "") for control in controls]
    return next((address for address in seen if not address.startswith("127.")), seen[0])


def _vllm(control: EngineControl) -> VllmControl:
    """The four phases of a transfer are vLLM's own."""
    return cast(VllmControl, control)
