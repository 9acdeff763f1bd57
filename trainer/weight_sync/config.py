"""Options of weight synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from pydantic import ConfigDict

from atroposlib.errors import ConfigError
from trainer.weight_sync.engines.control import PAUSE_MODES, PauseMode

TransportName: TypeAlias = Literal["auto", "gloo", "nccl", "ipc", "disk", "delta", "lora"]
TRANSPORTS: tuple[TransportName, ...] = get_args(TransportName)


@dataclass(kw_only=True)
class WeightSyncConfig:
    """How new weights get into the inference servers."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    use_registry: bool = False
    """Besides inference_servers, publish to the policy servers that are registered with the rollout server, as they come and go."""
    transport: TransportName = "auto"
    """auto: lora when only an adapter is trained, nccl when trainer and engines have CUDA, else gloo; disk for a pool of vLLM and SGLang.
    disk and delta: files in `folder`, which every server must see. ipc: trainer and engine on the same GPU. use_peft with another
    transport than lora sends merged weights."""
    timeout_s: float = 60.0
    """For one transfer; a publication tries three times at most."""
    pause_mode: PauseMode = "keep"
    """Requests in flight. keep: frozen, they go on with the new weights. wait: they end first. abort: they end at once.
    lora on SGLang: wait or abort."""
    recompute: bool = False
    """keep: let frozen requests compute their keys and values again under the new weights, at the cost of a prefill of all of them at
    every publication. Without it their next tokens attend to keys and values of the old policy: the reported logprobs are still
    those that sampled, so the correction weighs them rightly. New requests never share keys and values with another policy."""
    bucket_mib: float = 64.0
    """gloo, nccl: weights sent together."""
    folder: str | None = None
    """disk, delta, lora: where files go; <run_dir>/weights if absent."""
    keep: int = 2
    """disk, delta, lora: versions kept on disk."""
    probe: bool = True
    """Compare the engines' logprobs with the trainer's at the start, and refuse to train on engines that differ too much."""
    max_logprob_difference: float = 0.1
    """probe: mean absolute difference, nats, that is still accepted."""
    fingerprint_every: int = 10
    """Publications between two proofs by logprobs that a server runs what was sent; 0: never."""

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"weight_sync.transport must be one of {', '.join(TRANSPORTS)}, is {self.transport!r}")
        if self.pause_mode not in PAUSE_MODES:
            raise ConfigError(f"weight_sync.pause_mode must be one of {', '.join(PAUSE_MODES)}, is {self.pause_mode!r}")
        for name in ("timeout_s", "bucket_mib", "max_logprob_difference"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"weight_sync.{name} must be over 0, is {getattr(self, name)}")
        for name, least in {"keep": 2, "fingerprint_every": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"weight_sync.{name} must be at least {least}, is {getattr(self, name)}")
