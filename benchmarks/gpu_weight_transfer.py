"""CUDA IPC and NCCL with the weights of an 8B model: seconds and GB/s, against a copy of the same bytes on the device.

Our transports on one side; on the other a STAND-IN for vLLM's worker in a process of its own, which receives as vLLM's ipc
and nccl engines do, copies every tensor into memory of its own and compares checksums. It has no layers to load into, so
this is the transfer alone. NCCL needs a second GPU and vLLM. Memory: twice the weights and 2 GB (8B in bfloat16: 35 GB).

python -m benchmarks.gpu_weight_transfer
python -m benchmarks.gpu_weight_transfer --parameters 1e9 --rounds 3
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import pickle
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import httpx
import torch

from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.transports.base import Member
from trainer.weight_sync.transports.ipc import IpcTransport
from trainer.weight_sync.transports.nccl import NcclTransport

HIDDEN, INTERMEDIATE, VOCABULARY, HEAD = 4096, 12288, 151936, 128
QUERY_HEADS, KEY_HEADS = 32, 8
TIMEOUT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=8.2e9, help="about so many, in layers of Qwen3-8B's shape")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device, and torch finds none")
    torch.cuda.set_device(0)
    weights = {
        name: torch.randn(shape, dtype=torch.bfloat16, device="cuda") for name, shape in shapes(options.parameters)
    }
    size_bytes = sum(tensor.nbytes for tensor in weights.values())
    gpu = torch.cuda.get_device_name(0)
    print(f"{size_bytes / 2e9:.2f} B parameters in {len(weights)} tensors, {size_bytes / 1e9:.2f} GB, {gpu}")
    copy_s = median(options.rounds, lambda: copying_s(weights))
    report("copy on the device", copy_s, size_bytes, copy_s)
    torch.cuda.empty_cache()
    with ThreadPoolExecutor(4) as calls:
        ipc = IpcTransport(calls, dtype=torch.bfloat16)
        report("CUDA IPC", publishing_s(ipc, "ipc", 0, weights, options.rounds), size_bytes, copy_s)
        if torch.cuda.device_count() < 2 or not find_spec("vllm"):
            print("NCCL: left out, it needs two GPUs and vLLM in this environment")
            return
        for mib in (64, 256, 1024):
            nccl = NcclTransport(calls, bucket_bytes=mib * 2**20, dtype=torch.bfloat16)
            seconds = publishing_s(nccl, "nccl", 1, weights, options.rounds)
            report(f"NCCL, buckets of {mib} MiB", seconds, size_bytes, copy_s)


def shapes(parameters: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Qwen3-8B, with as many layers as come nearest to so many parameters."""
    layer = {
        "self_attn.q_proj": (QUERY_HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KEY_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KEY_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, QUERY_HEADS * HEAD),
        "self_attn.q_norm": (HEAD,),
        "self_attn.k_norm": (HEAD,),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    of_layer = sum(torch.Size(shape).numel() for shape in layer.values())
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(max(1, round((parameters - 2 * VOCABULARY * HIDDEN) / of_layer))):
        yield from ((f"model.layers.{i}.{name}.weight", shape) for name, shape in layer.items())
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def copying_s(weights: dict[str, torch.Tensor]) -> float:
    """Seconds to copy every tensor once, on the device."""
    copies = [torch.empty_like(tensor) for tensor in weights.values()]
    torch.cuda.synchronize()
    start = time.monotonic()
    for copy, tensor in zip(copies, weights.values(), strict=True):
        copy.copy_(tensor)
    torch.cuda.synchronize()
    return time.monotonic() - start


def publishing_s(transport: Any, backend: str, device: int, weights: dict[str, torch.Tensor], rounds: int) -> float:
    """Seconds of a send, in the median, from the pause to the server's last word. The first is not counted."""
    server = StandIn(backend, device)
    version = "default"
    seconds = []
    for round_ in range(rounds + 1):
        shipment = transport.prepare(weights.items(), str(round_))
        transport.open([Member(server.control, 1, version)], timeout_s=TIMEOUT_S)
        start = time.monotonic()
        transport.send(shipment, timeout_s=TIMEOUT_S)
        seconds.append(time.monotonic() - start)
        version = str(round_)
    assert server.ask("checksums", {}) == checksums(weights), "what arrived is not what was sent"
    transport.leave()
    server.end()
    return statistics.median(seconds[1:])


def checksums(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(tensor.view(torch.int16).sum(dtype=torch.int64)) for name, tensor in weights.items()}


def median(rounds: int, measure: Callable[[], float]) -> float:
    measure()
    return statistics.median(measure() for _ in range(rounds))


def report(name: str, seconds: float, size_bytes: int, copy_s: float) -> None:
    print(f"{name:26} {seconds:.3f} s  {size_bytes / seconds / 1e9:7.1f} GB/s  {seconds / copy_s:.2f} x the copy")


class StandIn:
    """A process that receives as a vLLM worker would, behind the routes of a server."""

    def __init__(self, backend: str, device: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, backend, device), daemon=True)
        self._process.start()
        self._one_at_a_time = threading.Lock()
        self.control = VllmControl("http://127.0.0.1:1", transport=httpx.MockTransport(self._answer))

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        with self._one_at_a_time:
            self._pipe.send((path, body))
            error, answer = self._pipe.recv()
        if error:
            raise RuntimeError(error)
        return answer

    def end(self) -> None:
        self._process.terminate()
        self._process.join()

    def _answer(self, request: httpx.Request) -> httpx.Response:
        try:
            self.ask(request.url.path, json.loads(request.content or b"{}"))
        except RuntimeError as error:
            return httpx.Response(500, json={"error": str(error)})
        return httpx.Response(200, json={})


def serve(pipe: Connection, backend: str, device: int) -> None:
    """The STAND-IN's side."""
    torch.cuda.set_device(device)
    worker = IpcWorker(device) if backend == "ipc" else NcclWorker(device)
    while True:
        path, body = pipe.recv()
        answer: Any = None
        try:
            if path == "/init_weight_transfer_engine":
                worker.join(body["init_info"])
            elif path == "/update_weights":
                worker.receive(body["update_info"])
                torch.cuda.synchronize()
            elif path == "checksums":
                answer = checksums(worker.weights)
            pipe.send((None, answer))
        except Exception as error:
            pipe.send((f"{type(error).__name__}: {error}", None))


class Worker:
    """Keeps what comes in memory of its own, which it allocates once, as a model does."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.weights: dict[str, torch.Tensor] = {}

    def join(self, info: dict[str, Any]) -> None:
        raise NotImplementedError

    def receive(self, info: dict[str, Any]) -> None:
        raise NotImplementedError

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self.weights:
            self.weights[name] = torch.empty_like(tensor)
        self.weights[name].copy_(tensor)


class IpcWorker(Worker):
    def __init__(self, device: int) -> None:
        super().__init__(device)
        self._opened: tuple[Any, torch.Tensor] | None = None

    def join(self, info: dict[str, Any]) -> None:
        assert info == {"packed": True}

    def receive(self, info: dict[str, Any]) -> None:
        handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
        packed = self._open(handles[str(torch.cuda.get_device_properties(self.device).uuid)])
        columns = zip(info["names"], info["dtype_names"], info["shapes"], info["tensor_sizes"], strict=True)
        start = 0
        for name, dtype_name, shape, size in columns:
            self.keep(name, packed[start : start + size].view(getattr(torch, dtype_name)).view(shape))
            start += size

    def _open(self, arguments: tuple[Any, ...]) -> torch.Tensor:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        if self._opened is None or self._opened[0] != arguments:
            self._opened = None  # let the last buffer go before the next is opened
            there = [*arguments[:6], self.device, *arguments[7:]]
            self._opened = (arguments, rebuild_cuda_tensor(*there))
        return self._opened[1]


class NcclWorker(Worker):
    def join(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        self._info = info
        self._group = stateless_init_process_group(
            info["master_address"],
            info["master_port"],
            info["rank_offset"],
            info["world_size"],
            torch.device("cuda", self.device),
        )

    def receive(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

        columns = zip(info["names"], info["shapes"], info["dtype_names"], strict=True)
        packed_nccl_broadcast_consumer(
            ((name, (shape, getattr(torch, dtype_name))) for name, shape, dtype_name in columns),
            self._group,
            0,
            lambda pairs: [self.keep(name, tensor) for name, tensor in pairs],
            buffer_size_bytes=self._info["packed_buffer_size_bytes"],
            num_buffers=self._info["packed_num_buffers"],
            device=torch.device("cuda", self.device),
        )


if __name__ == "__main__":
    main()
