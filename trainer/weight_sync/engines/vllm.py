"""The RL routes of one vLLM server: pause, weight transfer, versions. Every call has a deadline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from trainer.weight_sync.engines.control import EngineName, PauseMode
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge


class VllmControl:
    """An EngineControl for one vLLM server started with `VLLM_SERVER_DEV_MODE=1`, and the phases of its weight transfer.

    Args:
        url: of the server; a trailing `/v1` is dropped.
        transport: replaces the network in tests.
    """

    engine: EngineName = "vllm"

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url,
            transport=transport,
            # After an error in a worker vLLM resets the connection, so none is used twice. A publication
            # makes a dozen calls; a connection for each costs nothing.
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def health(self, *, timeout_s: float) -> None:
        """Return if the engine behind the server is alive and answers."""
        self._call("GET", "/health", Edge.ATTACH, timeout_s)

    def world_size(self, *, timeout_s: float) -> int:
        """Return the number of workers behind this server, data parallel ones included."""
        return int(self._call("GET", "/get_world_size", Edge.ATTACH, timeout_s)["world_size"])

    def is_paused(self, *, timeout_s: float) -> bool:
        """Return whether generation is paused."""
        return bool(self._call("GET", "/is_paused", Edge.ATTACH, timeout_s)["is_paused"])

    def pause(self, mode: PauseMode = "keep", *, recompute: bool = True, timeout_s: float) -> None:
        """See EngineControl.pause."""
        params = {"mode": mode, "clear_cache": "true" if recompute else "false"}
        self._call("POST", "/pause", Edge.PAUSE, timeout_s, params=params)

    def resume(self, *, timeout_s: float) -> None:
        """Let generation go on."""
        self._call("POST", "/resume", Edge.RESUME, timeout_s)

    def init_transfer(self, init_info: Mapping[str, Any], *, timeout_s: float) -> None:
        """Make the workers join the trainer's group. Blocks until all ranks have met."""
        self._call(
            "POST",
            "/init_weight_transfer_engine",
            Edge.ATTACH,
            timeout_s,
            json={"init_info": dict(init_info)},
        )

    def start_update(self, *, timeout_s: float) -> None:
        """Open an update."""
        self._call("POST", "/start_weight_update", Edge.SEND, timeout_s)

    def update_weights(self, update_info: Mapping[str, Any], *, timeout_s: float) -> None:
        """Make the workers receive what `update_info` describes. Blocks until they have it."""
        self._call("POST", "/update_weights", Edge.SEND, timeout_s, json={"update_info": dict(update_info)})

    def finish_update(self, weight_version: str | None, *, timeout_s: float) -> None:
        """Close the update and, unless None, name the version that the server now runs."""
        body = {} if weight_version is None else {"weight_version": weight_version}
        self._call("POST", "/finish_weight_update", Edge.SEND, timeout_s, json=body)

    def reset_prefix_cache(self, *, recompute: bool = True, timeout_s: float) -> bool:
        """Forget keys and values computed under other weights.

        Args:
            recompute: those of frozen requests too. Otherwise they stay, and with them the cache, while any are.
        Returns:
            Whether the cache is empty now.
        """
        params = {"reset_running_requests": "true" if recompute else "false"}
        answer = self._call("POST", "/reset_prefix_cache", Edge.VERIFY, timeout_s, params=params)
        return bool(answer["success"])

    def weight_version(self, *, timeout_s: float) -> str:
        """Return the version that the server says it runs; `default` for the weights it was started with."""
        return str(self._call("GET", "/weight_info", Edge.VERIFY, timeout_s)["weight_version"])

    def load_folder(self, folder: str, weight_version: str, *, timeout_s: float) -> None:
        """See EngineControl.load_folder."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": timeout_s}
        self._call("POST", "/collective_rpc", Edge.SEND, timeout_s, json=reload)
        self._call("POST", "/update_weight_version", Edge.SEND, timeout_s, json={"new_version": weight_version})

    def load_adapter(self, name: str, folder: str, *, timeout_s: float) -> None:
        """See EngineControl.load_adapter. The server needs `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` and `--enable-lora`."""
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        self._call("POST", "/v1/load_lora_adapter", Edge.SEND, timeout_s, json=body)

    def prompt_logprobs(
        self, token_ids: Sequence[int], *, temperature: float = 1.0, model: str | None = None, timeout_s: float
    ) -> list[float]:
        """See EngineControl.prompt_logprobs."""
        raise NotImplementedError

    def _call(self, method: str, path: str, edge: Edge, timeout_s: float, **request: Any) -> dict[str, Any]:
        try:
            # httpx's timeout is for each read and write; these answers are one small packet.
            response = self._http.request(method, path, timeout=timeout_s, **request)
        except httpx.TimeoutException:
            raise ServerSyncError(self.url, edge, f"{path} did not answer within {timeout_s:.3g} s") from None
        except httpx.TransportError as error:
            raise ServerSyncError(self.url, edge, f"{path}: {type(error).__name__}: {error}") from error
        if response.is_error:
            hint = "; was it started with VLLM_SERVER_DEV_MODE=1?" if response.status_code == 404 else ""
            raise ServerSyncError(
                self.url, edge, f"{path} answered {response.status_code}{hint} {response.text[:300]}".strip()
            )
        return dict(response.json()) if response.content else {}
