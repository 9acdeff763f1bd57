"""Servers and publishers. A module for another engine has `servers` of its own; the publishers go to those."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.trainer.weight_sync.fake_vllm import FakeVllm
from tests.trainer.weight_sync.publications import BUCKET_MIB, FakeServer, serving, urls_of
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.states import GRACE_S
from trainer.weight_sync.transports.gloo_group import READY_TIMEOUT_S


@pytest.fixture(scope="session", autouse=True)
def no_thread_is_left_waiting() -> Iterator[None]:
    """A thread that waits in torch while the interpreter ends aborts the process, and with it a test run that passed."""
    yield
    ends = time.monotonic() + READY_TIMEOUT_S + GRACE_S
    for thread in threading.enumerate():
        if thread.name == "weight-sync-receive":
            thread.join(max(0.0, ends - time.monotonic()))


@pytest.fixture
def servers() -> Iterator[list[FakeVllm]]:
    with serving(FakeVllm(), FakeVllm()) as fakes:
        yield fakes


@pytest.fixture
def connected(servers: Sequence[FakeServer]) -> Iterator[Callable[..., WeightPublisher]]:
    """Publishers to these URLs, closed at the end. Nothing waits for their deadline but a test that gives a short one."""
    publishers: list[WeightPublisher] = []

    def connected(urls: Sequence[str], *, timeout_s: float = 10.0, **options: Any) -> WeightPublisher:
        config = WeightSyncConfig(transport="gloo", bucket_mib=BUCKET_MIB, timeout_s=timeout_s, **options)
        publishers.append(connect(urls, config))
        return publishers[-1]

    yield connected
    for publisher in publishers:
        publisher.close()
    for fake in servers:
        fake.die()
    for publisher in publishers:
        publisher._calls.shutdown(wait=True)  # calls that a test left behind end with their server


@pytest.fixture
def publisher(servers: Sequence[FakeServer], connected: Callable[..., WeightPublisher]) -> WeightPublisher:
    return connected(urls_of(servers))
