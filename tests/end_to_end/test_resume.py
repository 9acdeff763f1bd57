"""SIGKILL at any moment, then the same command: the run ends as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

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

STEPS = 24
DEADLINE_S = 60.0
SEED = int(os.environ.get("RESUME_SEED", "0"))


def finish(options: dict[str, object]) -> None:
    process = start_trainer(options)
    process.join(DEADLINE_S)
    assert process.exitcode == 0


def kill_after(options: dict[str, object], run_dir: Path, steps: int, delay_s: float) -> None:
    """SIGKILL once that many lines of metrics are there, and a little later."""
    process = start_trainer(options)
    end = time.monotonic() + DEADLINE_S
    while len(lines_of(run_dir)) < steps:
        assert process.is_alive(), "the trainer ended before it was killed"
        assert time.monotonic() < end, "the trainer hangs"
        time.sleep(0.002)
    time.sleep(delay_s)
    process.kill()
    process.join()


def test_a_killed_run_has_the_losses_and_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    asyncio.run(record(tmp_path / "data", STEPS))
    save_model(tmp_path / "model")
    with replaying(tmp_path / "data") as url:
        whole, cut = (options_of(tmp_path / name, url, tmp_path / "model", STEPS) for name in ("whole", "cut"))
        finish(whole)

        kill_after(cut, tmp_path / "cut", rng.randint(4, STEPS // 2), rng.uniform(0, 0.03))
        taken = len(lines_of(tmp_path / "cut"))
        kill_after(cut, tmp_path / "cut", taken + rng.randint(1, 5), rng.uniform(0, 0.03))
        finish(cut)

    assert len(lines_of(tmp_path / "cut")) > STEPS, "no step was taken twice: the kills came too late"
    assert sorted(curve_of(tmp_path / "cut")) == list(range(STEPS))
    assert largest_difference(curve_of(tmp_path / "whole"), curve_of(tmp_path / "cut")) < 1e-5
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
