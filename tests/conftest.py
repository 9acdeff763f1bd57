from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import RolloutServerProcess


@pytest.fixture
def rollout_server(tmp_path: Path) -> Iterator[RolloutServerProcess]:
    server = RolloutServerProcess(tmp_path / "rollout_server")
    server.start()
    yield server
    server.stop()
