"""Steps with a loss or gradient that is no number: skipped and counted, by us or by DeepSpeed."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.trainer import fault_worker
from tests.trainer.ranks import run_ranks
from trainer.errors import NonFiniteError, TrainerError
from trainer.step.guard import MOST_IN_A_ROW, StepGuard


def a_model() -> Any:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    return model


@pytest.mark.parametrize(
    ("grad_norm", "loss", "skipped"), [(1.0, 0.5, 0), (math.nan, 0.5, 1), (math.inf, 0.5, 1), (1.0, math.nan, 1)]
)
def test_a_gradient_that_is_no_number_is_taken_away(grad_norm: float, loss: float, skipped: int) -> None:
    guard, model = StepGuard(is_deepspeed=False), a_model()
    guard.start()

    guard.check(grad_norm, model, None, loss=loss)

    assert guard.skipped == skipped
    assert all((parameter.grad is None) is bool(skipped) for parameter in model.parameters())


def test_too_many_skipped_batches_in_a_row_end_the_run() -> None:
    guard = StepGuard(is_deepspeed=False)

    def batch(step: int, grad_norm: float) -> None:
        guard.start()
        guard.check(grad_norm, a_model(), None)
        guard.finish(step)

    for step in range(MOST_IN_A_ROW - 1):
        batch(step, math.nan)
    batch(MOST_IN_A_ROW - 1, 1.0)
    for step in range(MOST_IN_A_ROW - 1):
        batch(step, math.nan)
    with pytest.raises(NonFiniteError, match="step 9"):
        batch(9, math.nan)


@pytest.mark.parametrize(("was_skipped", "skipped"), [(True, 1), (False, 0)])
def test_deepspeeds_own_skipping_is_counted(was_skipped: bool, skipped: int) -> None:
    guard = StepGuard(is_deepspeed=True)
    guard.start()

    guard.check(1.0, a_model(), SimpleNamespace(optimizer_step_was_skipped=was_skipped))

    assert guard.skipped == skipped


def test_a_step_that_deepspeed_should_have_skipped_ends_the_run() -> None:
    guard = StepGuard(is_deepspeed=True)

    with pytest.raises(TrainerError, match="DeepSpeed has taken a step with a gradient that is no number"):
        guard.check(math.nan, a_model(), SimpleNamespace(optimizer_step_was_skipped=False))


def test_deepspeed_skips_a_poisoned_step_and_one_without_gradient_and_the_run_goes_on(tmp_path: Path) -> None:
    done = run_ranks(
        fault_worker.main, str(tmp_path), "deepspeed=zero1", "poisoned_step=1", "level_step=3", "max_steps=5"
    )

    assert done.returncode == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step/skipped"] for line in lines] == [0, 1, 0, 0, 0]
    assert [line.get("step/without_gradient") for line in lines] == [None, None, None, 1.0, None]
    versions = torch.load(tmp_path / "versions.pt")
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(versions)]
    assert changed == [True, False, True, False, True]
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in final.values())
