"""FAKE SGLang server: the RL routes of SGLang 0.5.23, from its documented bodies, with one tensor-parallel worker.

Nothing generates here. It joins the trainer's group over real gloo just as SGLang does and receives real tensors; it has
SGLang's habits that a trainer must know: one scheduler that does one thing at a time, so that whoever is stuck in a
broadcast answers nothing; a paused server that does not resume in the middle of an update; /health that fails while paused;
updates only inside a session; a flush that is refused while requests hold the cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs

import torch
from safetensors.torch import load_file
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from tests.trainer.weight_sync.json_server import JsonServer

GROUP_TIMEOUT = timedelta(seconds=60)  # SGLang: half an hour

FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "/pause_generation": (set(), {"mode"}),
    "/continue_generation": (set(), {"torch_empty_cache"}),
    "/update_weight_version": ({"new_version"}, {"abort_all_requests"}),
    "/init_weights_update_group": (
        {"master_address", "master_port", "rank_offset", "world_size"},
        {"group_name", "backend"},
    ),
    "/destroy_weights_update_group": (set(), {"group_name"}),
    "/begin_weight_update": (set(), {"selector"}),
    "/end_weight_update": (set(), set()),
    "/update_weights_from_distributed": (
        {"names", "dtypes", "shapes"},
        {"group_name", "flush_cache", "abort_all_requests", "weight_version", "load_format"},
    ),
    "/update_weights_from_disk": (
        {"model_path"},
        {"load_format", "abort_all_requests", "weight_version", "flush_cache"},
    ),
    "/load_lora_adapter": ({"lora_name", "lora_path"}, {"pinned"}),
    "/unload_lora_adapter": ({"lora_name"}, set()),
    "/generate": (
        {"input_ids"},
        {"sampling_params", "return_logprob", "logprob_start_len", "lora_path"},
    ),
}
"""Required and optional fields of each body. Anything else is refused, more strictly than SGLang does."""


class Refusal(Exception):  # noqa: N818
    """An answer with `success: false`, under status 400 unless another is given."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class FakeSglang:
    """`faults` maps a path to what happens there first; it may raise Refusal, or never return."""

    PAUSE, JOIN, UPDATE = "/pause_generation", "/init_weights_update_group", "/update_weights_from_distributed"

    def __init__(self, *, has_sessions: bool = True, dp_size: int = 1) -> None:
        self.has_sessions = has_sessions
        self.dp_size = dp_size
        self.version = "default"
        self.is_paused = False
        self.pause_mode = ""
        self.running_requests = 0
        self.aborted_requests = 0
        self.weights: dict[str, torch.Tensor] = {}
        self.adapters: dict[str, str] = {}
        self.is_updating = False
        self.calls: list[str] = []
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[str, Callable[[], object]] = {}
        self.groups: dict[str, Any] = {}
        self._scheduler = threading.Lock()
        self._pause_condition = threading.Lock()
        self.http = JsonServer(self._answer)
        self.url = self.http.url

    def die(self) -> None:
        """As a killed process does."""
        self.http.die()
        self.groups.clear()

    def restart(self) -> None:
        """Forget everything, as a new process would."""
        self.groups.clear()
        self.weights = {}
        self.version = "default"
        self.is_paused = self.is_updating = False

    def _answer(self, path: str, query: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.calls.append(path)
        self.bodies.append((path, body))
        handler = getattr(self, f"_{path.strip('/').replace('/', '_')}", None)
        if handler is None or (not self.has_sessions and path in ("/begin_weight_update", "/end_weight_update")):
            return 404, {"detail": "Not Found"}
        required, optional = FIELDS.get(path, (set(), set()))
        if missing := required - body.keys():
            return 400, {"object": "error", "message": f"Field required: {missing}"}
        if unknown := body.keys() - required - optional:
            return 400, {"object": "error", "message": f"not in the documented body of {path}: {unknown}"}
        try:
            self.faults.get(path, lambda: None)()
            answer = handler(parse_qs(query), body)
        except Refusal as refusal:
            return refusal.status, {"success": False, "message": str(refusal)}
        except AssertionError:
            return 500, "Internal Server Error"
        return answer if isinstance(answer, tuple) else (200, answer)

    # What the HTTP process answers by itself

    def _health(self, query: Any, body: Any) -> Any:
        return (503, "") if self.is_paused else (200, "")

    def _ready(self, query: Any, body: Any) -> Any:
        return (503, "") if self.is_paused else (200, "")

    def _model_info(self, query: Any, body: Any) -> Any:
        return {"model_path": "tiny", "is_generation": True, "weight_version": self.version}

    def _pause_generation(self, query: Any, body: dict[str, Any]) -> Any:
        mode = body.get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            return 400, {"object": "error", "message": f"mode {mode!r}"}
        with self._pause_condition:
            self.is_paused, self.pause_mode = True, mode
            if mode == "abort":
                self.aborted_requests += self.running_requests
                self.running_requests = 0
        return {"message": "Generation paused successfully.", "status": "ok"}

    def _continue_generation(self, query: Any, body: dict[str, Any]) -> Any:
        with self._pause_condition:  # an update that runs holds it
            self.is_paused = False
        return {"message": "Generation continued successfully.", "status": "ok"}

    # What the scheduler answers, between two steps

    def _server_info(self, query: Any, body: Any) -> Any:
        with self._scheduler:
            return {"tp_size": 1, "pp_size": 1, "dp_size": self.dp_size, "version": "0.5.23", "internal_states": [{}]}

    def _update_weight_version(self, query: Any, body: dict[str, Any]) -> Any:
        with self._scheduler:
            if body.get("abort_all_requests", True):
                self.aborted_requests += self.running_requests
                self.running_requests = 0
            self.version = body["new_version"]
        return {"success": True, "message": "Weight version updated", "new_version": self.version}

    def _flush_cache(self, query: dict[str, list[str]], body: Any) -> Any:
        deadline = time.monotonic() + float(query.get("timeout", ["0"])[0])
        with self._scheduler:
            while not self._is_flushable():
                if time.monotonic() >= deadline:
                    return 400, "Flush cache failed.\n"
                time.sleep(0.005)
        return 200, "Cache flushed.\n"

    def _is_flushable(self) -> bool:
        is_parked = self.is_paused and self.pause_mode != "in_place"
        return is_parked or self.running_requests == 0

    def _init_weights_update_group(self, query: Any, body: dict[str, Any]) -> Any:
        assert self.dp_size == 1
        name = body.get("group_name", "weight_update_group")
        with self._scheduler:
            try:
                self.groups[name] = _join(body, name)
            except Exception as error:
                raise Refusal(f"Failed to initialize custom process group: {error}.") from error
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    def _destroy_weights_update_group(self, query: Any, body: dict[str, Any]) -> Any:
        with self._scheduler:
            if self.groups.pop(body.get("group_name", "weight_update_group"), None) is None:
                raise Refusal("The group to be destroyed does not exist.")
        return {"success": True, "message": "Succeeded to destroy custom process group."}

    def _begin_weight_update(self, query: Any, body: Any) -> Any:
        with self._scheduler:
            if self.is_updating:
                raise Refusal("a weight-update session is already open; call end_weight_update() first")
            self.is_updating = True
        return {"success": True, "message": "Success"}

    def _end_weight_update(self, query: Any, body: Any) -> Any:
        with self._scheduler:
            if not self.is_updating:
                raise Refusal("no weight-update session is open; call begin_weight_update() first")
            self.is_updating = False
        return {"success": True, "message": "Success"}

    def _update_weights_from_distributed(self, query: Any, body: dict[str, Any]) -> Any:
        assert self.dp_size == 1
        with self._pause_condition, self._scheduler:
            if self.has_sessions and not self.is_updating:
                raise Refusal("update_weights_from_distributed must run between begin_weight_update() and end")
            group = self.groups.get(body.get("group_name", "weight_update_group"))
            if group is None:
                raise Refusal("Failed to receive weights: Please call `init_weights_update_group` first.")
            try:
                self.weights |= _receive(group, body)
            except Exception as error:
                raise Refusal(f"Failed to receive weights: {error}") from error
            if body.get("flush_cache", True) and not self._is_flushable():
                raise Refusal("Weights were updated, but the cache was not flushed")
            self.version = body.get("weight_version") or self.version
        return {"success": True, "message": "Succeeded to update parameter online."}

    def _update_weights_from_disk(self, query: Any, body: dict[str, Any]) -> Any:
        with self._scheduler:
            try:
                self.weights = load_file(Path(body["model_path"]) / "model.safetensors")
            except Exception as error:
                raise Refusal(f"Failed to get weights iterator: {error}.") from error
            self.version = body.get("weight_version") or self.version
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def _load_lora_adapter(self, query: Any, body: dict[str, Any]) -> Any:
        if body["lora_name"] in self.adapters:
            message = f"Failed to load LoRA adapter {body['lora_name']} because it is already loaded"
            return 400, {"success": False, "error_message": message}
        self.adapters[body["lora_name"]] = body["lora_path"]
        return {"success": True, "error_message": None, "loaded_adapters": self.adapters}

    def _unload_lora_adapter(self, query: Any, body: dict[str, Any]) -> Any:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 400, {"success": False, "error_message": f"LoRA with name {body['lora_name']} does not exist"}
        return {"success": True, "error_message": None, "loaded_adapters": self.adapters}

    def _v1_models(self, query: Any, body: Any) -> Any:
        adapters = [{"id": name, "root": path, "parent": "tiny"} for name, path in self.adapters.items()]
        return {"object": "list", "data": [{"id": "tiny", "root": "tiny", "parent": None}, *adapters]}

    def _generate(self, query: Any, body: dict[str, Any]) -> Any:
        ids = body["input_ids"]
        if ids and isinstance(ids[0], list):
            count = body["sampling_params"]["max_new_tokens"]
            return [
                {
                    "output_ids": [prompt[-1]] * count,
                    "meta_info": {"output_token_logprobs": [[-0.5, prompt[-1], None]] * count},
                }
                for prompt in ids
            ]
        logprobs = [[None if i == 0 else -float(i), token, None] for i, token in enumerate(ids)]
        meta = {"input_token_logprobs": logprobs, "weight_version": self.version, "completion_tokens": 1}
        return {"text": "", "output_ids": [1], "meta_info": meta}


def _join(body: dict[str, Any], name: str) -> Any:
    """As SGLang's init_custom_process_group does."""
    rank, world_size = body["rank_offset"], body["world_size"]
    where = f"tcp://{body['master_address']}:{body['master_port']}"
    store, rank, world_size = next(rendezvous(where, rank, world_size, timeout=GROUP_TIMEOUT))
    store.set_timeout(GROUP_TIMEOUT)
    # torch's registry takes a name once a process, and here several servers share one.
    with patch.object(distributed_c10d, "_register_process_group"):
        group, _ = distributed_c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            distributed_c10d.Backend(body.get("backend", "nccl")),
            distributed_c10d.PrefixStore(name, store),
            group_name=distributed_c10d.GroupName(name),
            backend_options=None,
            timeout=GROUP_TIMEOUT,
        )
    for registry in ("pg_map", "pg_names", "pg_backend_config", "pg_to_tag"):
        getattr(distributed_c10d._world, registry).pop(group, None)
    return group


def _receive(group: Any, body: dict[str, Any]) -> dict[str, torch.Tensor]:
    dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
    columns = list(zip(body["names"], dtypes, body["shapes"], strict=True))
    if body.get("load_format") == "flattened_bucket":
        sizes = [dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in columns]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        _broadcast(group, flat)
        parts = torch.split(flat, sizes)
        return {
            name: part.view(dtype).reshape(shape) for part, (name, dtype, shape) in zip(parts, columns, strict=True)
        }
    received = {}
    for name, dtype, shape in columns:
        received[name] = torch.empty(shape, dtype=dtype)
        _broadcast(group, received[name])
    return received


def _broadcast(group: Any, tensor: torch.Tensor) -> None:
    options = distributed_c10d.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([tensor], options).wait()
