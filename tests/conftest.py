from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.processes import RolloutServerProcess

# As atropos-trainer does, before torch is used: its store looks up the name of every peer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# An example that takes long on a busy machine is no failure.
settings.register_profile("without_deadline", deadline=None)
settings.load_profile("without_deadline")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Command lines set up logging for their process, which here is also that of the other tests."""
    root, names = logging.getLogger(), ("", *list(logging.root.manager.loggerDict))
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = list(root.handlers)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def rollout_server(tmp_path: Path) -> Iterator[RolloutServerProcess]:
    server = RolloutServerProcess(tmp_path / "rollout_server")
    server.start()
    yield server
    server.stop()
