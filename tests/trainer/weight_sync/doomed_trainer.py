"""A trainer process that publishes WEIGHTS until it is killed."""

from __future__ import annotations

from multiprocessing.process import BaseProcess

from tests.trainer.ranks import start_forked
from tests.trainer.weight_sync.publications import BUCKET_MIB, WEIGHTS
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect


def _publish(urls: list[str]) -> None:
    publisher = connect(urls, WeightSyncConfig(transport="gloo", bucket_mib=BUCKET_MIB, timeout_s=10.0))
    publisher.attach()
    for version in range(1, 1000):
        publisher.publish(version, WEIGHTS.items())


def start(urls: list[str]) -> BaseProcess:
    """Start the trainer. Kill it."""
    return start_forked(_publish, urls)
