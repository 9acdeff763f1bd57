"""A trainer in this process, against a FAKE rollout server and a FAKE engine, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.trainer.fakes import FakePublisher, FakeRolloutServer, a_config, tiny_llama
from trainer.grpo_trainer import GRPOTrainer

CHECKPOINTS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
"""One after each step."""


class RememberingPublisher(FakePublisher):
    """Keeps every version."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: list[dict[str, Tensor]] = []

    def publish(self, version: int, weights: Any) -> Any:
        """See Publisher."""
        result = super().publish(version, weights)
        self.versions.append(self.weights)
        return result


def a_trainer(
    run_dir: Path,
    server: FakeRolloutServer,
    *,
    publisher: FakePublisher | None = None,
    callbacks: Any = (),
    **options: Any,
) -> GRPOTrainer:
    """Of a tiny model."""
    return GRPOTrainer(
        a_config(run_dir, **options),
        model=tiny_llama(),
        connect=server.client,
        publisher=publisher or FakePublisher(),
        callbacks=callbacks,
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
