"""SIGKILL of a trainer again and again, and of single ranks: losses and weights end as those of an uninterrupted run.

Runs where CHAOS_TRAINER_KILLS says how many trainers are to die: `make chaos`. A run of one process dies so often, one of
two ranks and ZeRO-2, which takes long to start, a tenth as often.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
import torch

from tests.end_to_end.replayed_run import (
    curve_of,
    largest_difference,
    lines_of,
    options_of,
    record,
    replaying,
    save_model,
    start_trainer,
    weights_of,
)

KILLS = int(os.environ.get("CHAOS_TRAINER_KILLS", "0"))
DEADLINE_S = 120.0
"""Far more than a start and a few steps take."""

pytestmark = [
    pytest.mark.skipif(KILLS == 0, reason="takes long: make chaos, or CHAOS_TRAINER_KILLS=20"),
    pytest.mark.timeout(300 + KILLS * DEADLINE_S),
]


class Trainer(Protocol):
    """A trainer of one process or several."""

    def kill(self, rng: random.Random) -> None: ...
    def exit_status(self) -> int | None: ...


class OneProcess:
    def __init__(self, options: dict[str, Any]) -> None:
        self._process = start_trainer(options)

    def kill(self, rng: random.Random) -> None:
        self._process.kill()
        self._process.join()

    def exit_status(self) -> int | None:
        return self._process.exitcode


class TwoRanks:
    def __init__(self, options: dict[str, Any]) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "127.0.0.1:0", "-m", "trainer.cli", "deepspeed=zero2",
            *(f"{key}={value}" for key, value in options.items()),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with Path(options["run_dir"]).with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def kill(self, rng: random.Random) -> None:
        """All at once, as a machine fails; or one rank, after which the launcher ends the other."""
        ranks = [
            child
            for child in psutil.Process(self._process.pid).children(recursive=True)
            if "trainer.cli" in child.cmdline()
        ]
        if ranks and rng.random() < 0.5:
            rng.choice(ranks).kill()
            assert self._process.wait(timeout=DEADLINE_S) != 0
        else:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def exit_status(self) -> int | None:
        return self._process.poll()


def wait_for(condition: Callable[[], bool], trainer: Trainer) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert trainer.exit_status() in (None, 0), "the trainer ended in an error"
        assert time.monotonic() < end, "the trainer hangs"
        time.sleep(0.005)


def finish(trainer: Trainer) -> None:
    wait_for(lambda: trainer.exit_status() is not None, trainer)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(int(os.environ.get("RESUME_SEED", "0")))


@pytest.mark.parametrize(("kind", "share"), [(OneProcess, 1.0), (TwoRanks, 0.1)], ids=["one-process", "zero2-2"])
def test_whoever_is_killed_losses_and_weights_are_those_of_an_uninterrupted_run(
    tmp_path: Path, rng: random.Random, kind: Callable[[dict[str, Any]], Trainer], share: float
) -> None:
    kills = max(2, round(KILLS * share))
    steps = 10 * kills
    asyncio.run(record(tmp_path / "data", steps))
    save_model(tmp_path / "model")
    with replaying(tmp_path / "data") as url:
        whole, cut = (options_of(tmp_path / name, url, tmp_path / "model", steps) for name in ("whole", "cut"))
        finish(kind(whole))
        for _ in range(kills):
            taken = len(lines_of(tmp_path / "cut"))
            # At any moment of a start, of a step, or of a checkpoint.
            goal = taken + rng.choice([0, rng.randint(1, 9)])
            trainer = kind(cut)
            wait_for(lambda goal=goal: len(lines_of(tmp_path / "cut")) >= goal, trainer)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.1))
            trainer.kill(rng)
        finish(kind(cut))

    assert sorted(curve_of(tmp_path / "cut")) == list(range(steps))
    assert largest_difference(curve_of(tmp_path / "whole"), curve_of(tmp_path / "cut")) < 1e-4
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
