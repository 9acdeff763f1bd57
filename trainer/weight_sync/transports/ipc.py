"""Weights by CUDA IPC into vLLM's own `ipc` engine: the servers read this process's buffer on the GPU that all share.

Source: vLLM 0.32, vllm/distributed/weight_transfer/ipc_engine.py, packed mode.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from atroposlib.errors import ConfigError
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError, TransferError
from trainer.weight_sync.states import Edge, time_left
from trainer.weight_sync.transports.base import Calls, Member, NamedWeights, post, settle
from trainer.weight_sync.transports.packed_chunks import Chunk, chunks_within, fill, specs_of
from trainer.weight_sync.transports.stock_update import put_back_all, put_back_share_s, start_clean, vllm

BUFFER_BYTES = 256 * 2**20
"""Of weights shared at a time, or one larger tensor."""

Handles = dict[str, tuple[Any, ...]]
"""By UUID of the GPU: the arguments with which torch opens the buffer in another process."""


class IpcDevice(Protocol):
    """The GPU that trainer and engines share."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A flat uint8 buffer."""

    def export(self, buffer: torch.Tensor) -> Handles:
        """Open the buffer to one more process."""

    def flush(self) -> None:
        """Wait until all that was written can be read by others."""

    def collect(self) -> None:
        """Take memory back that others have let go."""


@dataclass(frozen=True)
class IpcShipment:
    """Weights to be sent, once for every attempt."""

    weights: NamedWeights
    chunks: tuple[Chunk, ...]
    weight_version: str


class IpcTransport:
    """Shares one buffer with the servers, chunk by chunk. See Transport.

    A server must run on this process's GPU, on that one only, with `VLLM_ALLOW_INSECURE_SERIALIZATION=1`: handles travel
    pickled. After a failure a server has its old tensors back where none have arrived yet: it may run a mixture of both
    versions until the next attempt succeeds.

    Args:
        calls: runs the HTTP calls. One thread for each server at least.
        dtype: that floating-point weights are converted to, the servers' own.
        buffer_bytes: shared at a time.
        device: replaces CUDA in tests.

    Raises:
        ConfigError: this process has no GPU.
    """

    def __init__(
        self,
        calls: ThreadPoolExecutor,
        *,
        dtype: torch.dtype,
        buffer_bytes: int = BUFFER_BYTES,
        device: IpcDevice | None = None,
    ) -> None:
        self._device = device or CudaIpcDevice()
        self._calls = calls
        self._dtype = dtype
        self._buffer_bytes = buffer_bytes
        self._members: list[Member] = []
        self._versions: dict[str, str] = {}
        self._is_fresh = True
        self._shared: torch.Tensor | None = None

    def prepare(self, weights: NamedWeights, weight_version: str) -> IpcShipment:
        """Keep what can be gone through only once, and plan the chunks."""
        kept = list(weights) if iter(weights) is weights else weights
        chunks = chunks_within(specs_of(kept, dtype=self._dtype), capacity_bytes=self._buffer_bytes)
        return IpcShipment(kept, tuple(chunks), weight_version)

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """See Transport.open. There is nothing to meet: the servers only learn that buffers are packed."""
        versions = {member.control.url: member.weight_version for member in members}
        if self._versions == versions:
            return
        refused = {member.control.url: _spread(member) for member in members if member.world_size > 1}
        if refused:
            raise TransferError(Edge.ATTACH, "", refused)
        self.leave()
        self._members = list(members)
        deadline = time.monotonic() + timeout_s
        self._all(lambda c: c.init_transfer({"packed": True}, timeout_s=time_left(deadline)), deadline, Edge.ATTACH)
        self._versions = versions

    def send(self, shipment: IpcShipment, *, timeout_s: float) -> None:
        """See Transport.send."""
        put_back_s = put_back_share_s(timeout_s)
        deadline = time.monotonic() + timeout_s - put_back_s
        self._device.flush()  # what the trainer still computes
        buffer, handles = self._share(max((chunk.size_bytes for chunk in shipment.chunks), default=0))
        # Held here until all have answered, and after a failure until the next attempt: a server may still read it.
        self._shared = buffer
        receiving: Calls = {}
        try:
            self._start(deadline)
            pairs = iter(shipment.weights)
            for chunk in shipment.chunks:
                fill(chunk, pairs, buffer)
                self._device.flush()
                receiving = self._receive(chunk, handles, deadline)
                # The next chunk overwrites this one.
                settle(receiving, deadline=deadline, edge=Edge.SEND)
            self._all(lambda c: c.finish_update(shipment.weight_version, timeout_s=time_left(deadline)), deadline)
        except BaseException:
            put_back_all(self._members, receiving, self._calls, timeout_s=put_back_s)
            self.leave()
            raise
        self._versions = dict.fromkeys(self._versions, shipment.weight_version)
        self._shared = None
        self._device.collect()

    def leave(self) -> None:
        """See Transport.leave."""
        self._versions = {}
        self._is_fresh = True

    def _share(self, size_bytes: int) -> tuple[torch.Tensor, dict[str, Handles]]:
        try:
            buffer = self._device.allocate(size_bytes)
            # An export for each reader: torch counts readers, and a count below zero keeps the memory for ever.
            return buffer, {member.control.url: self._device.export(buffer) for member in self._members}
        except RuntimeError as error:  # out of memory, or memory of a kind that cannot be shared
            raise TransferError(
                Edge.SEND, f"no {size_bytes / 2**20:.0f} MiB of this GPU could be shared: {error}", {}
            ) from error

    def _start(self, deadline: float) -> None:
        if self._is_fresh:
            self._all(lambda c: start_clean(c, deadline=deadline), deadline)
        else:
            self._all(lambda c: c.start_update(timeout_s=time_left(deadline)), deadline)
        self._is_fresh = False

    def _receive(self, chunk: Chunk, handles: dict[str, Handles], deadline: float) -> Calls:
        infos = {url: update_info(chunk, handle) for url, handle in handles.items()}
        return self._post(lambda c: c.update_weights(infos[c.url], timeout_s=time_left(deadline)))

    def _all(self, call: Callable[[VllmControl], None], deadline: float, edge: Edge = Edge.SEND) -> None:
        settle(self._post(call), deadline=deadline, edge=edge)

    def _post(self, call: Callable[[VllmControl], None]) -> Calls:
        return post(self._calls, self._members, lambda control: call(vllm(control)))


class CudaIpcDevice:
    """The current CUDA device. See IpcDevice.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"weight_sync.transport=ipc needs a CUDA device, which the engines share (torch {torch.__version__} finds "
                "none); weight_sync.transport=gloo needs none"
            )
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._uuid = str(torch.cuda.get_device_properties(self._device).uuid)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """See IpcDevice.allocate."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def export(self, buffer: torch.Tensor) -> Handles:
        """See IpcDevice.export."""
        from torch.multiprocessing.reductions import reduce_tensor

        _, arguments = reduce_tensor(buffer)
        return {self._uuid: arguments}

    def flush(self) -> None:
        """See IpcDevice.flush."""
        torch.cuda.synchronize(self._device)

    def collect(self) -> None:
        """See IpcDevice.collect."""
        torch.cuda.ipc_collect()


def update_info(chunk: Chunk, handles: Handles) -> dict[str, Any]:
    """Return what a server is told about a chunk, and how it opens the buffer."""
    return {
        **chunk.columns,
        "tensor_sizes": chunk.sizes_bytes,
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }


def _spread(member: Member) -> ServerSyncError:
    return ServerSyncError(
        member.control.url,
        Edge.ATTACH,
        f"it has {member.world_size} workers on as many GPUs, and CUDA IPC reaches only the trainer's own; "
        "use weight_sync.transport=nccl",
    )
