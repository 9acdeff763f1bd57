"""A trainer process that pushes the demo model's weights to inference servers, version after version, until it is killed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from safetensors.torch import load_file

from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect

# Forked from a server that has imported torch once, and that has no threads yet.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def _push(urls: Sequence[str], weights_path: Path, first_version: int, at_work: Connection) -> None:
    weights = load_file(weights_path)
    publisher = connect(urls, WeightSyncConfig(timeout_s=30, bucket_mib=8))
    at_work.send(None)
    publisher.attach()
    for version in range(first_version, first_version + 1000):
        # Other weights than the model's, so that half of them would show in what it samples.
        publisher.publish(version, [(name, tensor * 1.01) for name, tensor in weights.items()])


def start(urls: Sequence[str], weights_path: Path, first_version: int) -> BaseProcess:
    """Start it; it is about to attach when this returns. Kill it."""
    at_work, child = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_push, args=(urls, weights_path, first_version, child), daemon=True)
    process.start()
    if not at_work.poll(120):
        raise TimeoutError("the trainer did not begin within 120 s")
    return process
