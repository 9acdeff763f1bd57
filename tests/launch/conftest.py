from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

FAKES = Path(__file__).parent / "fakes"


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write a config whose inference, environment and trainer are FAKES; the rollout server is the real one."""

    def write(**changes: Any) -> Path:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        config = {
            "name": "fake",
            "runs_dir": str(tmp_path / "runs"),
            "model": str(model),
            "environments": [{"command": str(FAKES / "environment.py"), "name": "toy", "group_size": 4}],
            "trainer": {"batch_size": 8, "max_steps": 6, "max_staleness": 1},
            "processes": {
                "inference": {"command": [sys.executable, str(FAKES / "inference.py")]},
                "trainer": {"command": [sys.executable, str(FAKES / "trainer.py")]},
            },
            "restart": {"first_pause_s": 0.1},
            **changes,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
