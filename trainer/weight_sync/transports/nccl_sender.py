"""Rank 0 of a NCCL group, on this process's GPU, as vLLM's `nccl` engine meets it. Needs CUDA and vLLM."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from atroposlib.errors import ConfigError
from trainer.weight_sync.transports.base import NamedWeights
from trainer.weight_sync.transports.packed_chunks import Chunk, fill


class Sender(Protocol):
    """Rank 0 of an open group."""

    def broadcast(self, chunks: Sequence[Chunk], weights: NamedWeights) -> None:
        """Send the chunks in order. Returns when all have left; blocks for as long as a receiver does not take part."""

    def abort(self) -> None:
        """Leave the group at once, also in the middle of a broadcast. Does not block."""


class Meet(Protocol):
    """Opens a group."""

    def __call__(self, listener: socket.socket, *, address: str, world_size: int, timeout_s: float) -> Sender:
        """Wait on `listener` for the other ranks, and open the group. May block beyond timeout_s."""


def cuda_meeting() -> Meet:
    """Return what opens a group on the current CUDA device.

    Raises:
        ConfigError: this environment has no CUDA or no vLLM.
    """
    missing = [
        *([] if torch.cuda.is_available() else [f"a CUDA device (torch {torch.__version__} finds none)"]),
        *([] if find_spec("vllm") else ["vLLM in the trainer's environment (scripts/install_vllm.sh)"]),
    ]
    if missing:
        raise ConfigError(
            f"weight_sync.transport=nccl needs {' and '.join(missing)}; weight_sync.transport=gloo needs neither"
        )
    import_module("vllm.distributed.device_communicators.pynccl")  # takes seconds, for which no server should wait
    device = torch.device("cuda", torch.cuda.current_device())

    def meet(listener: socket.socket, *, address: str, world_size: int, timeout_s: float) -> CudaSender:
        return CudaSender(listener, address=address, world_size=world_size, timeout_s=timeout_s, device=device)

    return meet


class CudaSender:
    """See Sender.

    Args:
        listener: bound and listening; the group takes it over.
        address: of the listener, as the other ranks reach it.
        world_size: this rank and all workers.
        timeout_s: until all ranks have found the store. What NCCL does then knows no deadline.
        device: that holds the weights.
    """

    def __init__(
        self, listener: socket.socket, *, address: str, world_size: int, timeout_s: float, device: torch.device
    ) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        self._device = device
        torch.cuda.set_device(device)  # of this thread
        group = StatelessProcessGroup.create(
            host=address,
            port=listener.getsockname()[1],
            rank=0,
            world_size=world_size,
            store_timeout=max(1, round(timeout_s)),
            listen_socket=listener,
        )
        with unpinned_nccl_env():
            self._communicator: Any = PyNcclCommunicator(group, device=device)
        if self._communicator.disabled:
            raise RuntimeError("vLLM found no NCCL library, or VLLM_DISABLE_PYNCCL is set")

    def broadcast(self, chunks: Sequence[Chunk], weights: NamedWeights) -> None:
        """See Sender.broadcast. The next chunk is packed while the last one travels."""
        torch.cuda.set_device(self._device)
        torch.cuda.synchronize()  # the optimizer's kernels ran on a stream of another thread
        largest_bytes = max((chunk.size_bytes for chunk in chunks), default=0)
        buffers = [torch.empty(largest_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
        left = [torch.cuda.Event() for _ in buffers]
        packing, sending = torch.cuda.Stream(), torch.cuda.Stream()
        pairs = iter(weights)
        for i, chunk in enumerate(chunks):
            buffer = buffers[i % 2][: chunk.size_bytes]
            left[i % 2].synchronize()
            with torch.cuda.stream(packing):
                fill(chunk, pairs, buffer)
            packing.synchronize()
            self._communicator.broadcast(buffer, src=0, stream=sending)
            left[i % 2].record(sending)
        sending.synchronize()

    def abort(self) -> None:
        """See Sender.abort."""
        # ncclCommAbort waits for kernels that it cannot always call off.
        threading.Thread(target=self._communicator.destroy, name="nccl-abort", daemon=True).start()
