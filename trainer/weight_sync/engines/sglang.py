"""The RL routes of one SGLang server: pause, weight updates, versions. Every call has a deadline.

Source: SGLang 0.5.23, entrypoints/http_server.py and managers/io_struct.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from trainer.weight_sync.engines.control import UNKNOWN_VERSION, EngineName, PauseMode
from trainer.weight_sync.engines.http import UNREADABLE, EngineHttp
from trainer.weight_sync.engines.sampling import Completion, completion, one_each
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge, time_left

_DRAIN_SHARE = 0.8
"""Of the time to pause, for requests to end; the rest is for the answer and the pause."""


class SglangControl:
    """An EngineControl for one SGLang server, and the calls of its weight update groups.

    Args:
        url: of the server; a trailing `/v1` is dropped.
        transport: replaces the network in tests.
    """

    engine: EngineName = "sglang"

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._http = EngineHttp(url, transport=transport)
        self.url = self._http.url

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def health(self, *, timeout_s: float) -> None:
        """Return if the server answers."""
        # Not /health: that generates a token, which takes a second, and never ends while generation is paused.
        self._call("GET", "/model_info", Edge.ATTACH, timeout_s)

    def world_size(self, *, timeout_s: float) -> int:
        """Return the number of workers behind this server, data parallel ones included."""
        info = self._call("GET", "/server_info", Edge.ATTACH, timeout_s)
        sizes = self._sizes(info)
        # Attention data parallelism runs inside the tensor-parallel group and adds no workers.
        replicas = 1 if info.get("enable_dp_attention") else sizes["dp_size"]
        return sizes["tp_size"] * sizes["pp_size"] * replicas

    def group_ranks(self, *, timeout_s: float) -> int:
        """Return how many ranks this server brings to a weight update group: one for each tensor-parallel worker.

        Raises:
            ServerSyncError: the server has replicas or stages, which cannot join.
        """
        sizes = self._sizes(self._call("GET", "/server_info", Edge.ATTACH, timeout_s))
        if sizes["dp_size"] > 1 or sizes["pp_size"] > 1:
            found = f"dp_size={sizes['dp_size']}, pp_size={sizes['pp_size']}"
            fix = "start one server for each replica, or use weight_sync.transport=disk"
            raise ServerSyncError(self.url, Edge.ATTACH, f"it runs {found}, but a weight update group takes 1; {fix}")
        return sizes["tp_size"]

    def is_paused(self, *, timeout_s: float) -> bool:
        """Return whether generation is paused, or the server not ready for another reason; it tells no more.

        To resume a server that is not paused does no harm.
        """
        return self._http.request("GET", "/ready", Edge.ATTACH, timeout_s).is_error

    def pause(self, mode: PauseMode = "keep", *, recompute: bool = True, timeout_s: float) -> None:
        """See EngineControl.pause. With mode `wait` it fails when requests do not end in time.

        SGLang takes new requests while it waits: under a steady load it never falls idle.
        """
        deadline = time.monotonic() + timeout_s
        how = "abort" if mode == "abort" else "retract" if recompute else "in_place"
        if mode == "wait":
            self._wait_until_idle(within_s=_DRAIN_SHARE * timeout_s, timeout_s=timeout_s)
            # What comes between idle and pause is parked without keys and values, so that the cache can be emptied.
            how = "retract"
        self._call("POST", "/pause_generation", Edge.PAUSE, time_left(deadline), json={"mode": how})

    def resume(self, *, timeout_s: float) -> None:
        """Let generation go on."""
        # The default empties the CUDA allocator's cache, which only costs time when weights are updated in place.
        self._call("POST", "/continue_generation", Edge.RESUME, timeout_s, json={"torch_empty_cache": False})

    def weight_version(self, *, timeout_s: float) -> str:
        """Return the version that the server says it runs; `default` for the weights it was started with."""
        reported = self._call("GET", "/model_info", Edge.VERIFY, timeout_s).get("weight_version")
        return UNKNOWN_VERSION if reported is None else str(reported)

    def name_version(self, weight_version: str, *, timeout_s: float) -> None:
        """Make the server call its weights so."""
        # The default aborts every request.
        body = {"new_version": weight_version, "abort_all_requests": False}
        self._call("POST", "/update_weight_version", Edge.SEND, timeout_s, json=body)

    def reset_prefix_cache(self, *, recompute: bool = True, timeout_s: float) -> bool:
        """See EngineControl.reset_prefix_cache. What was parked at the pause decides; `recompute` changes nothing here.

        Returns False as long as requests hold keys and values: they were frozen in place, or generation is not paused.
        """
        answer = self._http.request("POST", "/flush_cache", Edge.VERIFY, timeout_s)
        if answer.status_code == httpx.codes.BAD_REQUEST:
            return False
        self._read(answer, "/flush_cache", Edge.VERIFY)
        return True

    def load_folder(self, folder: str, weight_version: str, *, timeout_s: float) -> None:
        """See EngineControl.load_folder. Afterwards the server goes by the folder's name as its model."""
        # The cache is reset later, where it is seen whether that worked; here it would fail the update.
        body = {"model_path": folder, "weight_version": weight_version, "flush_cache": False}
        self._call("POST", "/update_weights_from_disk", Edge.SEND, timeout_s, json=body)

    def load_adapter(self, name: str, folder: str, *, timeout_s: float) -> None:
        """See EngineControl.load_adapter. The server needs `--enable-lora`.

        SGLang unloads an adapter when the last request that uses it has ended: frozen ones never do.
        """
        deadline = time.monotonic() + timeout_s
        unloaded = self._http.request("POST", "/unload_lora_adapter", Edge.SEND, timeout_s, json={"lora_name": name})
        # 400 also when it was not loaded; if it still is, loading it again says so.
        if unloaded.is_error and unloaded.status_code != httpx.codes.BAD_REQUEST:
            self._read(unloaded, "/unload_lora_adapter", Edge.SEND)
        body = {"lora_name": name, "lora_path": folder}
        self._call("POST", "/load_lora_adapter", Edge.SEND, time_left(deadline), json=body)

    def adapters(self, *, timeout_s: float) -> dict[str, str]:
        """Return the folder that each adapter was loaded from, by the adapter's name."""
        cards = self._call("GET", "/v1/models", Edge.SEND, timeout_s).get("data", [])
        try:
            return {card["id"]: card.get("root") or "" for card in cards if card.get("parent")}
        except UNREADABLE as error:
            reason = f"/v1/models answered what cannot be read ({error!r}): {str(cards)[:300]}"
            raise ServerSyncError(self.url, Edge.SEND, reason) from None

    def prompt_logprobs(self, token_ids: Sequence[int], *, model: str | None = None, timeout_s: float) -> list[float]:
        """See EngineControl.prompt_logprobs. They are at temperature 1."""
        body: dict[str, Any] = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        if model is not None:
            body["lora_path"] = model
        answer = self._call("POST", "/generate", Edge.VERIFY, timeout_s, json=body)
        return self._prompt_logprobs_of(answer, len(token_ids))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seed: int = 0,
        model: str | None = None,
        timeout_s: float,
    ) -> list[Completion]:
        """See SamplingControl.sample. A paused server queues the request: ask after resume."""
        body: dict[str, Any] = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {
                "max_new_tokens": max_tokens,
                "temperature": temperature,
                "ignore_eos": True,
                "sampling_seed": seed,
            },
            "return_logprob": True,
        }
        if model is not None:
            body["lora_path"] = model
        answer = self._http.request("POST", "/generate", Edge.VERIFY, timeout_s, json=body)
        self._read(answer, "/generate", Edge.VERIFY)
        try:
            found = [
                completion(one["output_ids"], [entry[0] for entry in one["meta_info"]["output_token_logprobs"]])
                for one in answer.json()
            ]
            return one_each(found, prompts)
        except UNREADABLE as error:
            reason = f"/generate gave no token ids or no logprobs: {answer.text[:300]}"
            raise ServerSyncError(self.url, Edge.VERIFY, reason) from error

    def init_group(self, group: Mapping[str, Any], *, timeout_s: float) -> None:
        """Make the workers join the trainer's group. Blocks until all ranks have met."""
        self._call("POST", "/init_weights_update_group", Edge.ATTACH, timeout_s, json=dict(group))

    def destroy_group(self, group_name: str, *, timeout_s: float) -> None:
        """Make the workers leave the group."""
        body = {"group_name": group_name}
        self._call("POST", "/destroy_weights_update_group", Edge.ATTACH, timeout_s, json=body)

    def begin_update(self, *, timeout_s: float) -> bool:
        """Open a session for updates from a group.

        Returns:
            Whether the server has sessions: older ones do without, and know no flat buckets.
        """
        answer = self._http.request("POST", "/begin_weight_update", Edge.SEND, timeout_s, json={"selector": "all"})
        if answer.status_code == httpx.codes.NOT_FOUND:
            return False
        self._read(answer, "/begin_weight_update", Edge.SEND)
        return True

    def end_update(self, *, timeout_s: float) -> None:
        """Close the session: the weights get the form that the engine computes with."""
        self._call("POST", "/end_weight_update", Edge.SEND, timeout_s, json={})

    def update_from_group(self, update: Mapping[str, Any], *, timeout_s: float) -> None:
        """Make the workers receive what `update` describes, and load it. Blocks until they have."""
        # A flush that is refused would fail the update, and took older servers down with it.
        body = {**update, "flush_cache": False}
        self._call("POST", "/update_weights_from_distributed", Edge.SEND, timeout_s, json=body)

    def _wait_until_idle(self, *, within_s: float, timeout_s: float) -> None:
        """Wait until no request runs or waits. The server looks, and empties its cache when it is so."""
        answer = self._http.request("POST", "/flush_cache", Edge.PAUSE, timeout_s, params={"timeout": within_s})
        if answer.status_code == httpx.codes.BAD_REQUEST:
            reason = f"requests still ran after {within_s:.3g} s; use weight_sync.pause_mode=keep or abort"
            raise ServerSyncError(self.url, Edge.PAUSE, reason)
        self._read(answer, "/flush_cache", Edge.PAUSE)

    def _sizes(self, info: Mapping[str, Any]) -> dict[str, int]:
        try:
            return {name: int(info.get(name, 1)) for name in ("tp_size", "pp_size", "dp_size")}
        except UNREADABLE as error:
            raise ServerSyncError(self.url, Edge.ATTACH, f"/server_info gave no sizes: {error!r}") from None

    def _prompt_logprobs_of(self, answer: Mapping[str, Any], n_tokens: int) -> list[float]:
        try:
            reported = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
            logprobs = [float(nats) for nats in reported[1:]]
        except UNREADABLE as error:
            reason = f"/generate gave no prompt logprobs that can be read: {error!r}"
            raise ServerSyncError(self.url, Edge.VERIFY, reason) from error
        if len(reported) != n_tokens:
            reason = f"/generate gave {len(reported)} prompt logprobs for {n_tokens} tokens"
            raise ServerSyncError(self.url, Edge.VERIFY, reason)
        return logprobs

    def _call(self, method: str, path: str, edge: Edge, timeout_s: float, **request: Any) -> dict[str, Any]:
        return self._read(self._http.request(method, path, edge, timeout_s, **request), path, edge)

    def _read(self, response: httpx.Response, path: str, edge: Edge) -> dict[str, Any]:
        """Return the answer's body; a body that is not JSON says nothing.

        Raises:
            ServerSyncError: an error status, or `success: false` under any status.
        """
        try:
            content = response.json()
        except ValueError:
            content = None
        body: dict[str, Any] = content if isinstance(content, dict) else {}
        if response.is_error:
            said = body.get("message") or body.get("error_message") or response.text
            hint = "; is it an SGLang server of at least 0.5.23?" if response.status_code == 404 else ""
            reason = f"{path} answered {response.status_code}{hint} {str(said)[:300]}".strip()
            raise ServerSyncError(self.url, edge, reason)
        if body.get("success") is False:
            said = body.get("message") or body.get("error_message") or "without a reason"
            raise ServerSyncError(self.url, edge, f"{path} answered success=false: {str(said)[:300]}")
        return body
