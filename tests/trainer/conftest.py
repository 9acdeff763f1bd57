"""What tests of the trainer share."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture
def calls() -> Iterator[ThreadPoolExecutor]:
    """Threads for a transport's calls to its servers."""
    executor = ThreadPoolExecutor(8)
    yield executor
    executor.shutdown(wait=True, cancel_futures=True)
