"""FAKE: the RL routes of a vLLM server with one worker, which receives over real gloo."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch

from trainer.weight_sync.transports import gloo_group
from trainer.weight_sync.transports.buckets import TensorSpec, lay_out

WEIGHTS = {f"layer.{i}.weight": torch.full((16, 8), float(i)) for i in range(6)}
BUCKET_MIB = 600 / 2**20  # two tensors of 16 x 8 bfloat16


class FakeVllm:
    """The RL routes of a vLLM server with one worker. `faults` maps a path to what happens there instead."""

    def __init__(self) -> None:
        self.version = "default"
        self.is_paused = False
        self.weights: dict[str, torch.Tensor] = {}
        self.calls: list[str] = []
        self.pauses: list[str] = []
        """Query of each pause, e.g. mode=keep&clear_cache=true."""
        self.errors: list[Exception] = []
        self.shapes: dict[str, tuple[int, ...]] | None = None
        """Of the tensors that its model has; None: any will do."""
        self.open_calls = 0
        self.faults: dict[str, Callable[[], object]] = {}
        self.route_to: Callable[[str, int], tuple[str, int]] = lambda address, port: (address, port)
        """Where it goes to meet a trainer that says it waits at this address and port."""
        self._staged: dict[str, torch.Tensor] = {}
        self._is_updating = False
        self._meeting: gloo_group.Meeting | None = None
        self._rank_offset = 0
        self._connections: list[Any] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections open, as vLLM does

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                self._answer(json.loads(self.rfile.read(length) or b"{}"))

            def _answer(self, body: dict[str, Any]) -> None:
                path, query = urlsplit(self.path).path, urlsplit(self.path).query
                engine.calls.append(path)
                engine.open_calls += 1
                try:
                    if path == "/pause":
                        engine.pauses.append(query)
                    engine.faults.get(path, lambda: None)()
                    status, answer = 200, engine.respond(path, body)
                except Exception as error:
                    engine.errors.append(error)
                    status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
                finally:
                    engine.open_calls -= 1
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def process_request(self, request: Any, client_address: Any) -> None:
                engine._connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def respond(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        match path:
            case "/health":
                return {}
            case "/get_world_size":
                return {"world_size": 1}
            case "/weight_info":
                return {"weight_version": self.version}
            case "/is_paused":
                return {"is_paused": self.is_paused}
            case "/pause":
                self.is_paused = True
            case "/resume":
                self.is_paused = False
            case "/reset_prefix_cache":
                return {"success": True}
            case "/init_weight_transfer_engine":
                self._join(**body["init_info"])
            case "/start_weight_update":
                if self._is_updating:
                    raise RuntimeError("a weight update is already active")
                self._is_updating = True
                self._staged = {}
            case "/update_weights":
                self._update(body["update_info"])
            case "/finish_weight_update":
                self._is_updating = False
                self.version = body.get("weight_version", self.version)
        return {}

    def restart(self) -> None:
        """Forget everything, as a new process would."""
        self._meeting = None
        self._is_updating = self.is_paused = False
        self.version = "default"

    def die(self) -> None:
        """Close the door and every connection, as the kernel does for a killed process."""
        self._server.shutdown()
        self._server.server_close()
        self._meeting = None
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _join(self, master_address: str, master_port: int, rank_offset: int, world_size: int, timeout_s: float) -> None:
        self._meeting = None
        self._meeting = gloo_group.join(
            *self.route_to(master_address, master_port),
            rank=rank_offset,
            rank_offset=rank_offset,
            world_size=world_size,
            timeout_s=timeout_s,
        )
        self._rank_offset = rank_offset

    def _update(self, info: dict[str, Any]) -> None:
        if info.get("commit"):
            for name, tensor in self._staged.items():
                if self.shapes is not None and self.shapes.get(name) != tuple(tensor.shape):
                    raise ValueError(f"no parameter {name!r} of shape {tuple(tensor.shape)}")
            self.weights = dict(self._staged)
            return
        if self._meeting is None:
            raise RuntimeError("this engine has met no trainer")
        columns = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        bucket = lay_out([TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in columns])
        buffer = torch.empty(bucket.size_bytes, dtype=torch.uint8)
        gloo_group.receive(
            self._meeting,
            buffer,
            sequence=info["sequence"],
            rank_offset=self._rank_offset,
            timeout_s=info["timeout_s"],
        )
        for slot in bucket.slots:
            view = buffer[slot.offset_bytes : slot.end_bytes].view(getattr(torch, slot.spec.dtype_name))
            self._staged[slot.spec.name] = view.view(slot.spec.shape)


def broken() -> None:
    """A fault: the call fails."""
    raise RuntimeError("broken")


def at_call(number: int, action: Callable[[], object]) -> Callable[[], None]:
    """A fault that acts at its `number`th call only."""
    calls = iter(range(1, 1_000_000))

    def act() -> None:
        if next(calls) == number:
            action()

    return act


def runs(fake: FakeVllm, version: str, weights: Mapping[str, torch.Tensor] = WEIGHTS) -> bool:
    """Whether it generates, with these weights, and calls them by this version."""
    same = all(torch.equal(fake.weights[name], tensor.bfloat16()) for name, tensor in weights.items())
    return same and fake.version == version and not fake.is_paused
