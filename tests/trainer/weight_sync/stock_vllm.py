"""FAKE vLLM workers for tests of the nccl and ipc transports, which need GPUs that tests do not have.

What is real: the bodies go through HTTP encoding and vLLM's own dataclasses, weights are unpacked by vLLM's own functions,
and the session of an update follows vLLM 0.32 (v1/worker/gpu_worker.py, model_loader/reload/layerwise.py). What is not: NCCL
and CUDA IPC are queues and a dictionary in this process, and a layer is one tensor.
"""

from __future__ import annotations

import json
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
import torch

from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.transports.base import Member, NamedWeights, Transport
from trainer.weight_sync.transports.packed_chunks import Chunk, fill


class FakeWorker:
    """One server with one worker, behind the routes of vLLM. `faults` maps a path to what happens there instead."""

    def __init__(self, engine: FakeEngine, port: int = 1) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.engine = engine
        self.version = "default"
        self.weights: dict[str, torch.Tensor] = {}
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.faults: dict[str, Callable[[], None]] = {}
        self.is_updating = False
        self.is_runnable = True
        """False while layers are without tensors."""
        self._loaded: dict[str, torch.Tensor] = {}
        self.control = VllmControl(self.url, transport=httpx.MockTransport(self._answer))

    def member(self, world_size: int = 1) -> Member:
        return Member(self.control, world_size, self.version)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        body = json.loads(request.content or b"{}")
        self.calls.append(path)
        self.bodies.append(body)
        try:
            self.faults.get(path, lambda: None)()
            self._respond(path, body)
        except Exception as error:
            return httpx.Response(500, json={"error": f"{type(error).__name__}: {error}"})
        return httpx.Response(200, json={})

    def _respond(self, path: str, body: dict[str, Any]) -> None:
        match path:
            case "/init_weight_transfer_engine":
                self.engine.meet(self, body["init_info"])
            case "/start_weight_update":
                if self.is_updating:
                    raise RuntimeError("start_weight_update called while a weight update is already active")
                self.is_updating, self.is_runnable = True, False
            case "/update_weights":
                if not self.is_updating:
                    raise RuntimeError("start_weight_update must be called before update_weights")
                try:
                    self.faults.get("load", lambda: None)()
                    self.engine.receive(self, body["update_info"], self._loaded.update)
                except BaseException:
                    self.is_updating = False
                    raise
            case "/finish_weight_update":
                if not self.is_updating:
                    raise RuntimeError("finish_weight_update called without a matching start_weight_update")
                self.weights |= self._loaded
                self._loaded = {}
                self.is_updating, self.is_runnable = False, True
                self.version = body.get("weight_version", self.version)


class FakeEngine:
    """What a worker does with the two bodies that differ between vLLM's engines."""

    def meet(self, worker: FakeWorker, init_info: dict[str, Any]) -> None:
        raise NotImplementedError

    def receive(self, worker: FakeWorker, update_info: dict[str, Any], load: Callable[[Any], None]) -> None:
        raise NotImplementedError


class FakeNccl(FakeEngine):
    """A group whose broadcasts are queues: as in NCCL, nobody gets on before all take part, or until an abort."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.distributed.weight_transfer import packed_tensor

        class Stream:
            def synchronize(self) -> None:
                pass

        monkeypatch.setattr(packed_tensor, "_get_streams", lambda _, count: tuple(Stream() for _ in range(count)))
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        self.inits: dict[str, Any] = {}
        self.senders: list[FakeSender] = []
        self.joined: queue.Queue[str] = queue.Queue()

    def meet(self, worker: FakeWorker, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

        self.inits[worker.url] = NCCLWeightTransferInitInfo(**init_info)
        self.joined.put(worker.url)

    def open(self, listener: Any, *, address: str, world_size: int, timeout_s: float) -> FakeSender:
        """What stands in for `cuda_meeting()`."""
        listener.close()
        try:
            urls = [self.joined.get(timeout=timeout_s) for _ in range(world_size - 1)]
        except queue.Empty:
            raise RuntimeError("the store waited in vain") from None  # as torch's does, which is a RuntimeError too
        self.senders.append(FakeSender(urls))
        return self.senders[-1]

    def receive(self, worker: FakeWorker, update_info: dict[str, Any], load: Callable[[Any], None]) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

        info = NCCLWeightTransferUpdateInfo(**update_info)
        described: Iterator[Any] = (
            (name, (shape, getattr(torch, dtype)))
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True)
        )
        init = self.inits[worker.url]
        packed_nccl_broadcast_consumer(
            described,
            self.senders[-1].receivers[worker.url],
            0,
            lambda pairs: load({name: tensor.clone() for name, tensor in pairs}),
            buffer_size_bytes=init.packed_buffer_size_bytes,
            num_buffers=init.packed_num_buffers,
            device="cpu",
        )


class FakeSender:
    """Rank 0. See trainer.weight_sync.transports.nccl_sender.Sender."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.is_aborted = threading.Event()
        self.sizes_bytes: list[int] = []
        self.receivers = {url: FakeReceiver(self.is_aborted) for url in urls}

    def broadcast(self, chunks: Sequence[Chunk], weights: NamedWeights) -> None:
        pairs = iter(weights)
        for chunk in chunks:
            buffer = torch.empty(chunk.size_bytes, dtype=torch.uint8)
            fill(chunk, pairs, buffer)
            self.sizes_bytes.append(chunk.size_bytes)
            for receiver in self.receivers.values():
                receiver.sent.put(buffer)
        for receiver in self.receivers.values():
            while receiver.sent.unfinished_tasks:
                if self.is_aborted.wait(0.002):
                    raise RuntimeError("NCCL error: the communicator was aborted")

    def abort(self) -> None:
        self.is_aborted.set()


class FakeReceiver:
    """A worker's communicator."""

    def __init__(self, is_aborted: threading.Event) -> None:
        self.sent: queue.Queue[torch.Tensor] = queue.Queue()
        self._is_aborted = is_aborted

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        while not self._is_aborted.is_set():
            try:
                sent = self.sent.get(timeout=0.002)
            except queue.Empty:
                continue
            assert sent.numel() == tensor.numel(), "NCCL would hang: the two sides cut the stream differently"
            tensor.copy_(sent)
            self.sent.task_done()
            return
        raise RuntimeError("NCCL error: the communicator was aborted")


class FakeIpc(FakeEngine):
    """A GPU: memory of this process, opened by a number. Also stands in for `CudaIpcDevice`."""

    UUID = "GPU-of-both"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        self.exports: list[Any] = []
        self.opened: dict[str, set[int]] = {}
        self.is_packed: dict[str, bool] = {}
        self.allocated: Callable[[], torch.Tensor | None] = lambda: None
        self.sizes_bytes: list[int] = []

    def allocate(self, size_bytes: int) -> torch.Tensor:
        buffer = torch.zeros(size_bytes, dtype=torch.uint8)
        self.allocated = weakref.ref(buffer)
        self.sizes_bytes.append(size_bytes)
        return buffer

    def export(self, buffer: torch.Tensor) -> dict[str, tuple[Any, ...]]:
        self.exports.append(weakref.ref(buffer))
        return {self.UUID: (torch.Tensor, torch.uint8, len(self.exports) - 1)}

    def flush(self) -> None:
        pass

    def collect(self) -> None:
        pass

    def meet(self, worker: FakeWorker, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo

        self.is_packed[worker.url] = IPCWeightTransferInitInfo(**init_info).packed

    def receive(self, worker: FakeWorker, update_info: dict[str, Any], load: Callable[[Any], None]) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
        from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

        info = IPCWeightTransferUpdateInfo(**update_info)
        assert self.is_packed[worker.url]
        assert isinstance(info.ipc_handles, dict)
        assert info.tensor_sizes is not None
        number = info.ipc_handles[self.UUID][-1]
        self.opened.setdefault(worker.url, set()).add(number)
        buffer = self.exports[number]()
        assert buffer is not None, "the shared memory was freed under the reader"
        dtypes = [getattr(torch, name) for name in info.dtype_names]
        packed = buffer[: sum(info.tensor_sizes)]
        pairs = unpack_tensor(packed, info.names, info.shapes, dtypes, info.tensor_sizes)
        load({name: tensor.clone() for name, tensor in pairs})


WEIGHTS = {
    "embed.weight": torch.randn(40, 8),
    "norm.weight": torch.randn(8).double(),
    "layer.0.weight": torch.randn(16, 8).t(),
    "layer.1.weight": torch.randn(16, 8, requires_grad=True),
    "steps": torch.arange(5),
}
"""Several dtypes, a view that is not contiguous, one that asks for gradients."""


def publish(transport: Transport[Any], workers: Sequence[FakeWorker], version: str, timeout_s: float = 20.0) -> None:
    """What the publisher does with a transport."""
    shipment = transport.prepare(WEIGHTS.items(), version)
    transport.open([worker.member() for worker in workers], timeout_s=timeout_s)
    transport.send(shipment, timeout_s=timeout_s)


def assert_holds(worker: FakeWorker, version: str) -> None:
    """The worker runs WEIGHTS, in bfloat16 where they are floating-point."""
    assert worker.version == version
    assert worker.is_runnable
    assert list(worker.weights) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        sent = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert worker.weights[name].dtype == sent.dtype
        assert torch.equal(worker.weights[name], sent)
