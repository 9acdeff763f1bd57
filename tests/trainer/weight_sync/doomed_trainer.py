"""A trainer process that publishes WEIGHTS until it is killed."""

from __future__ import annotations

import multiprocessing
from multiprocessing.process import BaseProcess

from tests.trainer.weight_sync.publications import BUCKET_MIB, WEIGHTS
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect

# Forked from a server that has imported torch once, and that has no threads yet.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


def _publish(urls: list[str]) -> None:
    publisher = connect(urls, WeightSyncConfig(transport="gloo", bucket_mib=BUCKET_MIB, timeout_s=10.0))
    publisher.attach()
    for version in range(1, 1000):
        publisher.publish(version, WEIGHTS.items())


def start(urls: list[str]) -> BaseProcess:
    """Start the trainer. Kill it."""
    process = _processes.Process(target=_publish, args=(urls,), daemon=True)
    process.start()
    return process
