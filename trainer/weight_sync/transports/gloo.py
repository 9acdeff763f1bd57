"""Weights over a gloo group: this process is rank 0, the workers of every vLLM server are the others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports.base import Member, NamedWeights, require_time
from trainer.weight_sync.transports.buckets import PIECE_ITEMS, Bucket, TensorSpec, plan_buckets
from trainer.weight_sync.transports.gloo_servers import GlooServers


@dataclass(frozen=True)
class GlooShipment:
    """Weights in the form in which they travel, for every attempt."""

    buckets: list[tuple[Bucket, torch.Tensor]]
    """Each with its flat uint8 buffer."""
    weight_version: str


class GlooTransport:
    """Rank 0 of one group over the workers of all members. See Transport.

    Args:
        calls: runs the HTTP calls that block until rank 0 does its part. One thread for each server at least.
        bucket_bytes: of weights sent together.
        dtype: that floating-point weights are converted to, the servers' own.
    """

    def __init__(self, calls: ThreadPoolExecutor, *, bucket_bytes: int, dtype: torch.dtype) -> None:
        self._calls = calls
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self._servers: GlooServers | None = None
        self._buffers: list[torch.Tensor] = []
        """One copy of the weights, kept between publications: fresh memory costs more than filling it."""

    def prepare(self, weights: NamedWeights, weight_version: str) -> GlooShipment:
        """Convert and pack, while the engines still generate."""
        buckets = packed_buckets(weights, self._buffers, capacity_bytes=self._bucket_bytes, dtype=self._dtype)
        return GlooShipment(list(buckets), weight_version)

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """See Transport.open. A server that restarted, or met another trainer, reports another version than ours."""
        deadline = time.monotonic() + timeout_s
        versions = {member.control.url: member.weight_version for member in members}
        if self._servers is not None and self._servers.versions == versions:
            return
        self.leave()
        servers = GlooServers(members, self._calls)
        try:
            servers.meet(timeout_s=timeout_s)
            require_time(deadline, Edge.ATTACH)
        except BaseException:
            # An error keeps its frames, and with them the group: the workers would wait in it.
            servers.close()
            raise
        self._servers = servers

    def send(self, shipment: GlooShipment, *, timeout_s: float) -> None:
        """See Transport.send."""
        assert self._servers is not None
        self._servers.send(shipment.buckets, shipment.weight_version, timeout_s=timeout_s)

    def leave(self) -> None:
        """See Transport.leave."""
        if self._servers is not None:
            self._servers.close()
            self._servers = None


def packed_buckets(
    weights: NamedWeights, buffers: list[torch.Tensor], *, capacity_bytes: int, dtype: torch.dtype
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Yield buckets of weights, floating-point ones converted to `dtype`, each with its flat uint8 buffer.

    Args:
        buffers: flat uint8, used again where they are large enough; what is missing is added.
    """
    held: deque[torch.Tensor] = deque()

    def specs() -> Iterator[TensorSpec]:
        for name, tensor in weights:
            held.append(tensor)
            sent_as = dtype if tensor.is_floating_point() else tensor.dtype
            yield TensorSpec(name, str(sent_as).removeprefix("torch."), tuple(tensor.shape))

    for number, bucket in enumerate(plan_buckets(specs(), capacity_bytes=capacity_bytes)):
        buffer = _buffer(buffers, number, bucket.size_bytes)
        for slot in bucket.slots:
            place = buffer[slot.offset_bytes : slot.end_bytes].view(getattr(torch, slot.spec.dtype_name))
            _copy(place, held.popleft().detach().reshape(-1))
        yield bucket, buffer


def _buffer(buffers: list[torch.Tensor], number: int, size_bytes: int) -> torch.Tensor:
    if number == len(buffers):
        buffers.append(torch.empty(0, dtype=torch.uint8))
    if buffers[number].numel() < size_bytes:
        buffers[number] = torch.empty(size_bytes, dtype=torch.uint8)
    return buffers[number][:size_bytes]


def _copy(place: torch.Tensor, values: torch.Tensor) -> None:
    """Flat to flat. Only a conversion on the CPU is worth cutting into pieces."""
    step = PIECE_ITEMS if values.device.type == "cpu" and values.dtype != place.dtype else max(1, len(values))
    for start in range(0, len(values), step):
        place[start : start + step].copy_(values[start : start + step])
