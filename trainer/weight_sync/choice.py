"""Which transport suits the engines of a pool. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from atroposlib.errors import ConfigError
from trainer.weight_sync.config import TransportName
from trainer.weight_sync.engines.control import EngineName, PauseMode

_TAKEN_BY: dict[TransportName, frozenset[EngineName]] = {
    "gloo": frozenset({"vllm", "sglang"}),
    "nccl": frozenset({"vllm", "sglang"}),
    "disk": frozenset({"vllm", "sglang"}),
    "lora": frozenset({"vllm", "sglang"}),
    "ipc": frozenset({"vllm"}),
    "delta": frozenset({"vllm"}),
}
_FOR_BOTH_AT_ONCE: tuple[TransportName, ...] = ("disk", "lora")
"""The others speak one engine's protocol to all servers."""


def choose_transport(
    asked: TransportName,
    engines: Mapping[str, EngineName],
    *,
    has_cuda: bool,
    is_adapter: bool,
    pause_mode: PauseMode,
) -> TransportName:
    """Return the transport to use, never `auto`.

    Args:
        asked: weight_sync.transport.
        engines: by URL.
        has_cuda: trainer and engines have it.
        is_adapter: only an adapter is sent.

    Raises:
        ConfigError: the servers cannot take it; it names them, and what works.
    """
    kinds = frozenset(engines.values())
    name = asked if asked != "auto" else _auto(kinds, has_cuda=has_cuda, is_adapter=is_adapter)
    works = "lora" if is_adapter else "disk" if len(kinds) > 1 else "nccl" if has_cuda else "gloo"
    if refusing := [url for url, engine in engines.items() if engine not in _TAKEN_BY[name]]:
        raise ConfigError(
            f"weight_sync.transport={name} is for vLLM, but {_listed(refusing)} runs SGLang; "
            f"use weight_sync.transport={works}"
        )
    if len(kinds) > 1 and name not in _FOR_BOTH_AT_ONCE:
        raise ConfigError(
            f"weight_sync.transport={name} takes servers of one engine, but {_by_engine(engines)}; "
            f"use weight_sync.transport={works}, with a folder that all of them see"
        )
    if name == "lora" and not is_adapter:
        raise ConfigError(
            f"weight_sync.transport=lora sends an adapter, but all weights are trained; train one with use_peft=true, "
            f"or use weight_sync.transport={works}"
        )
    if name == "lora" and "sglang" in kinds and pause_mode == "keep":
        frozen_on = [url for url, engine in engines.items() if engine == "sglang"]
        raise ConfigError(
            f"SGLang ({_listed(frozen_on)}) replaces an adapter when no request uses it any more, which frozen ones never "
            "stop to do; use weight_sync.pause_mode=abort or wait"
        )
    return name


def _auto(kinds: frozenset[EngineName], *, has_cuda: bool, is_adapter: bool) -> TransportName:
    if is_adapter:
        return "lora"
    if len(kinds) > 1:
        return "disk"
    return "nccl" if has_cuda else "gloo"


def _by_engine(engines: Mapping[str, EngineName]) -> str:
    kinds = sorted(set(engines.values()), reverse=True)
    return " and ".join(f"{_listed([url for url in engines if engines[url] == kind])} runs {kind}" for kind in kinds)


def _listed(urls: list[str]) -> str:
    return ", ".join(urls)
