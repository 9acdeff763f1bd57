"""A long run holds no more at its end than at its start."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor
from transformers import TrainerCallback

from tests.trainer.fakes import FakeRolloutServer
from tests.trainer.in_memory import a_trainer


class Belongings(TrainerCallback):  # type: ignore[misc]
    """What the process holds, every 20 steps."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int, int, int]] = []
        """Bytes, tensors, threads, open files."""
        self._process = psutil.Process()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % 20:
            return
        gc.collect()
        # type(), not isinstance(): that would wake up lazy modules.
        tensors = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        self.held.append(
            (self._process.memory_info().rss, tensors, self._process.num_threads(), self._process.num_fds())
        )


def test_two_hundred_steps_leak_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # How long a disk takes is not the question here.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    watch = Belongings()

    a_trainer(tmp_path, FakeRolloutServer(), callbacks=[watch], max_steps=200).train()

    (first_bytes, *first), *_ = watch.held[3:]
    last_bytes, *last = watch.held[-1]
    assert len(watch.held) == 10
    assert last == first
    # Measured: about nothing. A leak of one batch's tensors a step would be more.
    assert last_bytes - first_bytes < 8 * 2**20
