"""The trainer's side of a weight transfer over gloo: rank 0 of one group over the workers of every server."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from torch.distributed import Work

from trainer.weight_sync import gloo_group
from trainer.weight_sync.buckets import Bucket, TensorSpec, plan_buckets
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.states import Edge
from trainer.weight_sync.vllm_control import VllmControl

NamedWeights = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Member:
    """A server in the group."""

    control: VllmControl
    world_size: int


class GlooTransport:
    """An open group. Any error leaves it unusable: close it and open another.

    Args:
        members: the servers, each with its number of workers.
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
        timeout_s: until all have met, and for each operation on the group later.
        bucket_bytes: of weights sent together; this process holds two such buffers.
        dtype: that floating-point weights are converted to, the servers' own.

    Raises:
        TransferError: the servers did not meet here in time.
    """

    def __init__(
        self,
        members: Sequence[Member],
        calls: ThreadPoolExecutor,
        *,
        timeout_s: float,
        bucket_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        self._members = list(members)
        self._calls = calls
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
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

        def join(control: VllmControl) -> None:
            info = {
                "master_address": address,
                "master_port": self._store.port,
                "rank_offset": rank_offsets[control.url],
                "world_size": 1 + self._workers,
                "timeout_s": timeout_s,
            }
            control.init_transfer(info, timeout_s=timeout_s)

        joining = self._post(join)
        try:
            gloo_group.wait_for_count(
                self._store,
                gloo_group.JOINING,
                self._workers,
                deadline=deadline,
                check=lambda: _raise_failed(joining),
            )
            self._group = gloo_group.open_group(
                self._store, rank=0, world_size=1 + self._workers, address=address, timeout_s=timeout_s
            )
        except (RuntimeError, TimeoutError) as error:
            raise TransferError(Edge.ATTACH, str(error), _failures(joining)) from error
        self._settle(joining, deadline, Edge.ATTACH)

    @property
    def urls(self) -> list[str]:
        """The servers in the group."""
        return [member.control.url for member in self._members]

    def close(self) -> None:
        """Leave the group, once. A worker that still waits in it fails at once rather than at its deadline."""
        del self._group, self._store

    def send(self, weights: NamedWeights, weight_version: str, *, timeout_s: float) -> None:
        """Bring the weights to every server and make it call them `weight_version`.

        The next bucket is packed while the last one travels.

        Raises:
            TransferError: a server failed, or `timeout_s` passed. Without a commit the old weights stay.
        """
        deadline = time.monotonic() + timeout_s
        self._settle(self._post(lambda control: _start_update(control, deadline)), deadline, Edge.SEND)
        travelling: _Travelling | None = None
        for bucket, buffer in packed_buckets(weights, capacity_bytes=self._bucket_bytes, dtype=self._dtype):
            if travelling is not None:
                self._arrive(travelling, deadline)
            travelling = self._depart(bucket, buffer, deadline)
        if travelling is not None:
            self._arrive(travelling, deadline)
        self._settle(
            self._post(lambda control: control.update_weights({"commit": True}, timeout_s=_left(deadline))),
            deadline,
            Edge.SEND,
        )
        self._settle(
            self._post(lambda control: control.finish_update(weight_version, timeout_s=_left(deadline))),
            deadline,
            Edge.SEND,
        )

    def _depart(self, bucket: Bucket, buffer: torch.Tensor, deadline: float) -> _Travelling:
        sequence, self._sequence = self._sequence, self._sequence + 1
        info = {
            "sequence": sequence,
            "names": [spec.name for spec in bucket.specs],
            "dtype_names": [spec.dtype_name for spec in bucket.specs],
            "shapes": [list(spec.shape) for spec in bucket.specs],
        }
        receiving = self._post(lambda control: control.update_weights(info, timeout_s=_left(deadline)))
        # A gloo operation cannot be called off, so it starts only when every worker stands ready for it.
        counter = gloo_group.bucket_counter(sequence)
        try:
            gloo_group.wait_for_count(
                self._store, counter, self._workers, deadline=deadline, check=lambda: _raise_failed(receiving)
            )
        except (RuntimeError, TimeoutError) as error:
            raise TransferError(Edge.SEND, str(error), _failures(receiving)) from error
        self._store.delete_key(counter)
        return _Travelling(gloo_group.broadcast(self._group, buffer, timeout_s=_left(deadline)), receiving)

    def _arrive(self, travelling: _Travelling, deadline: float) -> None:
        try:
            travelling.work.wait()
        except RuntimeError as error:
            raise TransferError(Edge.SEND, str(error), {}) from error
        self._settle(travelling.receiving, deadline, Edge.SEND)

    def _post(self, call: Callable[[VllmControl], None]) -> _Calls:
        return {m.control.url: self._calls.submit(call, m.control) for m in self._members}

    def _settle(self, calls: _Calls, deadline: float, edge: Edge) -> None:
        """Wait for calls that need nothing more from this side."""
        wait(calls.values(), timeout=_left(deadline))
        failures = _failures(calls)
        late = [url for url, call in calls.items() if not call.done()]
        if failures or late:
            raise TransferError(edge, f"no answer in time from {', '.join(late)}" if late else "", failures)


_Calls = dict[str, "Future[None]"]


@dataclass(frozen=True)
class _Travelling:
    work: Work
    receiving: _Calls


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
        control.start_update(timeout_s=_left(deadline))
    except ServerSyncError:
        # A trainer that died in the middle left its update open. Finishing it before a commit abandons it.
        control.finish_update(None, timeout_s=_left(deadline))
        control.start_update(timeout_s=_left(deadline))


def _own_address(controls: Sequence[VllmControl]) -> str:
    """Return an address of this machine that every server reaches: loopback only if all are here."""
    seen = [gloo_group.local_address_towards(urlsplit(control.url).hostname or "") for control in controls]
    return next((address for address in seen if not address.startswith("127.")), seen[0])


def _left(deadline: float) -> float:
    """Return the seconds until `deadline`, or a moment if it has passed: the call then fails by itself."""
    return max(deadline - time.monotonic(), 0.05)


def _failures(calls: _Calls) -> dict[str, ServerSyncError]:
    done = {url: call.exception() for url, call in calls.items() if call.done()}
    return {url: error for url, error in done.items() if isinstance(error, ServerSyncError)}


def _raise_failed(calls: _Calls) -> None:
    if failures := _failures(calls):
        # Not the failure itself: it is kept in results, and would keep the frames of this transfer alive.
        raise RuntimeError("; ".join(map(str, failures.values())))
