"""FAKE: the RL routes of a vLLM server with one worker, which receives over real gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.trainer.weight_sync.json_server import JsonServer
from trainer.weight_sync.transports import gloo_group
from trainer.weight_sync.transports.buckets import TensorSpec, lay_out


class FakeVllm:
    """The RL routes of a vLLM server with one worker. `faults` maps a path to what happens there instead."""

    PAUSE, JOIN, UPDATE = "/pause", "/init_weight_transfer_engine", "/update_weights"

    def __init__(self) -> None:
        self.version = "default"
        self.is_paused = False
        self.is_updating = False
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
        self._meeting: gloo_group.Meeting | None = None
        self._rank_offset = 0
        self.http = JsonServer(self._answer)
        self.url = self.http.url

    def _answer(self, path: str, query: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.calls.append(path)
        self.open_calls += 1
        try:
            if path == self.PAUSE:
                self.pauses.append(query)
            self.faults.get(path, lambda: None)()
            return 200, self.respond(path, body)
        except Exception as error:
            self.errors.append(error)
            return 500, {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.open_calls -= 1

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
                if self.is_updating:
                    raise RuntimeError("a weight update is already active")
                self.is_updating = True
                self._staged = {}
            case "/update_weights":
                self._update(body["update_info"])
            case "/finish_weight_update":
                self.is_updating = False
                self.version = body.get("weight_version", self.version)
        return {}

    def restart(self) -> None:
        """Forget everything, as a new process would."""
        self._meeting = None
        self.is_updating = self.is_paused = False
        self.version = "default"

    def die(self) -> None:
        """As a killed process does."""
        self.http.die()
        self._meeting = None

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
