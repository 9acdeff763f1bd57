"""Build the publisher that a configuration asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atroposlib.errors import ConfigError
from trainer.weight_sync.choice import choose_transport
from trainer.weight_sync.config import TransportName, WeightSyncConfig
from trainer.weight_sync.engines.control import EngineControl, EngineName
from trainer.weight_sync.engines.detect import LateControl, control_for
from trainer.weight_sync.passage import Prove
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.transports.base import Transport
from trainer.weight_sync.transports.chosen import ChosenTransport
from trainer.weight_sync.transports.torch_group import GroupBackend

log = logging.getLogger(__name__)

THREADS_A_SERVER = 4
_SERVERS_TO_COME = 16
"""Threads are made when they are needed, so room for servers that join later costs nothing."""
DETECT_S = 2.0
"""For a server to say what it is, when the trainer starts."""
ADAPTER_NAME = "policy"
"""Under which the servers serve an adapter that is trained."""


def connect(
    servers: Sequence[str],
    config: WeightSyncConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    folder: Path | None = None,
    model_folder: str | None = None,
    has_cuda: bool | None = None,
    adapter: dict[str, Any] | None = None,
    prove: Prove | None = None,
) -> WeightPublisher:
    """A publisher for these servers. Servers that do not answer cost DETECT_S together; they are asked again later.

    Args:
        servers: base URLs.
        dtype: the servers' own; floating-point weights are converted to it on the way.
        folder: where files go unless `config.folder` says otherwise; for disk, delta and lora.
        model_folder: of the model that the servers were started with; for disk and delta.
        has_cuda: trainer and engines have CUDA. None: the engines do if the trainer does.
        adapter: peft's configuration of the adapter if only that is sent.
        prove: see WeightPublisher.

    Raises:
        ConfigError: `config.transport` does not suit the servers that answer, or lacks what it needs.
    """
    config = config or WeightSyncConfig()
    calls = ThreadPoolExecutor(
        max_workers=THREADS_A_SERVER * max(len(servers), _SERVERS_TO_COME), thread_name_prefix="weight-sync"
    )
    controls = list(calls.map(lambda url: control_for(url, DETECT_S), servers))
    ways = _Ways(
        config,
        calls,
        dtype=dtype,
        folder=Path(config.folder) if config.folder else folder,
        model_folder=model_folder,
        has_cuda=torch.cuda.is_available() if has_cuda is None else has_cuda,
        adapter=adapter,
    )
    try:
        transport = ChosenTransport(ways.suiting, engines_of(controls))
    except ConfigError:
        calls.shutdown(wait=False)
        raise
    return WeightPublisher(
        controls,
        transport,
        calls,
        timeout_s=config.timeout_s,
        pause_mode=config.pause_mode,
        recompute=config.recompute,
        prove=prove,
    )


def engines_of(controls: Sequence[EngineControl]) -> dict[str, EngineName]:
    """The engines of the servers that have answered, by URL."""
    known = [control for control in controls if not isinstance(control, LateControl) or control.is_known]
    return {control.url: control.engine for control in known}


@dataclass(frozen=True)
class _Ways:
    """Builds transports, with what each of them needs."""

    config: WeightSyncConfig
    calls: ThreadPoolExecutor
    dtype: torch.dtype
    folder: Path | None
    model_folder: str | None
    has_cuda: bool
    adapter: dict[str, Any] | None

    def suiting(self, engines: Mapping[str, EngineName]) -> Transport[Any]:
        """The transport that config.transport means for these engines."""
        name = choose_transport(
            self.config.transport,
            engines,
            has_cuda=self.has_cuda,
            is_adapter=self.adapter is not None,
            pause_mode=self.config.pause_mode,
        )
        is_sglang = "sglang" in engines.values()
        log.info("weights travel by %s to %s", name, ", ".join(f"{url} ({engines[url]})" for url in engines))
        return self._files(name) if name in ("disk", "delta", "lora") else self._direct(name, is_sglang=is_sglang)

    # Imports are late because each way brings libraries along that the others do without.

    def _direct(self, name: TransportName, *, is_sglang: bool) -> Transport[Any]:
        bucket_bytes = int(self.config.bucket_mib * 2**20)
        if is_sglang:
            from trainer.weight_sync.transports.sglang_group import SglangGroupTransport

            backend: GroupBackend = "nccl" if name == "nccl" else "gloo"
            return SglangGroupTransport(self.calls, backend=backend, bucket_bytes=bucket_bytes, dtype=self.dtype)
        if name == "nccl":
            from trainer.weight_sync.transports.nccl import NcclTransport

            return NcclTransport(self.calls, bucket_bytes=bucket_bytes, dtype=self.dtype)
        if name == "ipc":
            from trainer.weight_sync.transports.ipc import IpcTransport

            return IpcTransport(self.calls, dtype=self.dtype)
        from trainer.weight_sync.transports.gloo import GlooTransport

        return GlooTransport(self.calls, bucket_bytes=bucket_bytes, dtype=self.dtype)

    def _files(self, name: TransportName) -> Transport[Any]:
        if self.folder is None:
            raise ConfigError(f"weight_sync.transport={name} writes files; set weight_sync.folder")
        keep = self.config.keep
        if name == "lora":
            from trainer.weight_sync.transports.lora import LoraTransport

            assert self.adapter is not None
            return LoraTransport(
                self.calls, folder=self.folder, keep=keep, adapter_name=ADAPTER_NAME, adapter_config=self.adapter
            )
        if self.model_folder is None:
            raise ConfigError(f"weight_sync.transport={name} needs the folder of the model that the servers run")
        if name == "delta":
            from trainer.weight_sync.transports.delta import DeltaTransport

            return DeltaTransport(
                self.calls, folder=self.folder, keep=keep, dtype=self.dtype, model_folder=self.model_folder
            )
        from trainer.weight_sync.transports.disk import DiskTransport

        return DiskTransport(
            self.calls, folder=self.folder, keep=keep, dtype=self.dtype, model_folder=self.model_folder
        )
