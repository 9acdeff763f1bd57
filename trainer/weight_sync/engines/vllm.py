"""The RL routes of one vLLM server: pause, weight transfer, versions. Every call has a deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from trainer.weight_sync.engines.control import EngineName, PauseMode
from trainer.weight_sync.engines.http import UNREADABLE, EngineHttp
from trainer.weight_sync.engines.sampling import Completion, completion, one_each
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge

_T = TypeVar("_T")


class VllmControl:
    """An EngineControl for one vLLM server started with `VLLM_SERVER_DEV_MODE=1`, and the phases of its weight transfer.

    Args:
        url: of the server; a trailing `/v1` is dropped.
        transport: replaces the network in tests.
    """

    engine: EngineName = "vllm"

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._http = EngineHttp(url, transport=transport)
        self.url = self._http.url

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def health(self, *, timeout_s: float) -> None:
        """Return if the engine behind the server is alive and answers."""
        self._call("GET", "/health", Edge.ATTACH, timeout_s)

    def world_size(self, *, timeout_s: float) -> int:
        """Return the number of workers behind this server, data parallel ones included."""
        found = self._ask("GET", "/get_world_size", "world_size", Edge.ATTACH, timeout_s)
        return self._read(lambda: int(found), "/get_world_size gave no number", Edge.ATTACH, found)

    def is_paused(self, *, timeout_s: float) -> bool:
        """Return whether generation is paused."""
        return bool(self._ask("GET", "/is_paused", "is_paused", Edge.ATTACH, timeout_s))

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
        return bool(self._ask("POST", "/reset_prefix_cache", "success", Edge.VERIFY, timeout_s, params=params))

    def weight_version(self, *, timeout_s: float) -> str:
        """Return the version that the server says it runs; `default` for the weights it was started with."""
        return str(self._ask("GET", "/weight_info", "weight_version", Edge.VERIFY, timeout_s))

    def load_folder(self, folder: str, weight_version: str, *, timeout_s: float) -> None:
        """See EngineControl.load_folder."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": timeout_s}
        self._call("POST", "/collective_rpc", Edge.SEND, timeout_s, json=reload)
        self.name_version(weight_version, timeout_s=timeout_s)

    def name_version(self, weight_version: str, *, timeout_s: float) -> None:
        """Make the server call its weights so."""
        self._call("POST", "/update_weight_version", Edge.SEND, timeout_s, json={"new_version": weight_version})

    def load_adapter(self, name: str, folder: str, *, timeout_s: float) -> None:
        """See EngineControl.load_adapter. The server needs `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` and `--enable-lora`."""
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        self._call("POST", "/v1/load_lora_adapter", Edge.SEND, timeout_s, json=body)

    def adapters(self, *, timeout_s: float) -> dict[str, str]:
        """Return the folder that each adapter was loaded from, by the adapter's name."""
        cards = self._ask("GET", "/v1/models", "data", Edge.SEND, timeout_s)
        return self._read(
            lambda: {card["id"]: card.get("root") or "" for card in cards if card.get("parent")},
            *("/v1/models gave no names", Edge.SEND, cards),
        )

    def prompt_logprobs(self, token_ids: Sequence[int], *, model: str | None = None, timeout_s: float) -> list[float]:
        """See EngineControl.prompt_logprobs. A paused engine queues the request: ask after resume.

        The prefix cache is not read, so the values are those of the weights that run now; at temperature 1, whatever the
        server's --logprobs-mode.
        """
        body = {"prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        choices = self._complete(body, model, timeout_s)

        def logprobs() -> list[float]:
            found = choices[0]["prompt_logprobs"][1:]
            return [float(found[i][str(token_id)]["logprob"]) for i, token_id in enumerate(token_ids[1:])]

        return self._read(logprobs, "/v1/completions gave no logprobs of the prompt", Edge.VERIFY, choices)

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
        """See SamplingControl.sample. A paused engine queues the request: ask after resume."""
        body = {
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        choices = self._complete(body, model, timeout_s)

        def completions() -> list[Completion]:
            ordered = sorted(choices, key=lambda choice: int(choice["index"]))
            found = [completion(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in ordered]
            return one_each(found, prompts)

        return self._read(completions, "/v1/completions gave no token ids or no logprobs", Edge.VERIFY, choices)

    def chat_token_ids(
        self, messages: Sequence[Mapping[str, str]], *, model: str | None = None, timeout_s: float
    ) -> list[int]:
        """See SamplingControl.chat_token_ids."""
        body = {"messages": [dict(message) for message in messages], "add_generation_prompt": True, **_named(model)}
        found = self._ask("POST", "/tokenize", "tokens", Edge.VERIFY, timeout_s, json=body)
        return self._read(lambda: [int(token) for token in found], "/tokenize gave no token ids", Edge.VERIFY, found)

    def _complete(self, body: Mapping[str, Any], model: str | None, timeout_s: float) -> Any:
        request = {**body, **_named(model)}
        return self._ask("POST", "/v1/completions", "choices", Edge.VERIFY, timeout_s, json=request)

    def _read(self, read: Callable[[], _T], problem: str, edge: Edge, found: object) -> _T:
        """What `read` makes of an answer.

        Raises:
            ServerSyncError: the answer has another form.
        """
        try:
            return read()
        except UNREADABLE as error:
            reason = f"{problem}, {error!r}: {str(found)[:300]}"
            raise ServerSyncError(self.url, edge, reason) from None

    def _call(self, method: str, path: str, edge: Edge, timeout_s: float, **request: Any) -> dict[str, Any]:
        response = self._http.request(method, path, edge, timeout_s, **request)
        if response.is_error:
            hint = _missing_route(path) if response.status_code == 404 else ""
            raise ServerSyncError(
                self.url, edge, f"{path} answered {response.status_code}{hint} {response.text[:300]}".strip()
            )
        try:
            content = response.json()
        except ValueError:
            content = None  # some routes answer in plain text, or not at all
        return content if isinstance(content, dict) else {}

    def _ask(self, method: str, path: str, key: str, edge: Edge, timeout_s: float, **request: Any) -> Any:
        """One value of the answer."""
        answer = self._call(method, path, edge, timeout_s, **request)
        if key not in answer:
            raise ServerSyncError(self.url, edge, f"{path} answered without {key!r}: {str(answer)[:300]}")
        return answer[key]


def _named(model: str | None) -> dict[str, str]:
    """Absent rather than null where none is asked for."""
    return {} if model is None else {"model": model}


def _missing_route(path: str) -> str:
    if "lora" in path:
        return "; was it started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1?"
    return "" if path == "/v1/completions" else "; was it started with VLLM_SERVER_DEV_MODE=1?"
