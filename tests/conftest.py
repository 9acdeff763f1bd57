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

LONGEST = (
    "end_to_end/test_whole_loop.py",
    "end_to_end/test_local_mode.py",
    "end_to_end/test_weight_sync.py",
    "end_to_end/test_disk_and_lora.py",
    "end_to_end/test_resume.py",
    "chaos/test_sigkill.py",
    "trainer/test_ranks.py",
    "trainer/test_leaks.py",
    "trainer/test_local.py",
    "trainer/test_gradient_equality.py",
    "compat/test_old_environments.py",
    "launch/test_up.py",
    "docker/test_compose.py",
    "chaos/test_environment_outages.py",
    "chaos/test_redis_servers.py",
    "trainer/local/test_loop.py",
    "trainer/supervised/test_ranks_supervised.py",
    "docs/test_docs.py",
)
"""Files of many seconds, begun first: at the end one of them would keep all workers but one waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort what takes longest to the front, file by file."""
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


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
