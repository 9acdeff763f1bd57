"""Build the publisher that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.transports.gloo import GlooTransport

THREADS_A_SERVER = 4


def connect(
    servers: Sequence[str], config: WeightSyncConfig | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> WeightPublisher:
    """A publisher for these servers.

    Args:
        servers: base URLs.
        dtype: the servers' own; floating-point weights are converted to it on the way.
    """
    config = config or WeightSyncConfig()
    controls = [VllmControl(url) for url in servers]
    calls = ThreadPoolExecutor(max_workers=THREADS_A_SERVER * len(controls), thread_name_prefix="weight-sync")
    transport = GlooTransport(calls, bucket_bytes=int(config.bucket_mib * 2**20), dtype=dtype)
    return WeightPublisher(
        controls,
        transport,
        calls,
        timeout_s=config.timeout_s,
        pause_mode=config.pause_mode,
        recompute=config.recompute,
    )
