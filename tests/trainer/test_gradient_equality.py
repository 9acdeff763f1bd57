"""One step of the trainer has the loss and gradient of a plain reference, however it is packed, accumulated and distributed."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from tests.trainer import gradient_worker
from tests.trainer.gradient_worker import LAYOUTS, SETTINGS, Case, cases
from tests.trainer.mixed_batch import mixed_groups, scored_by, sharp_llama
from tests.trainer.plain_reference import Answer, plain_step, relative_error, two_plain_steps
from tests.trainer.ranks import run_ranks

TOLERANCE = 1e-5
REFERENCE_SEED = 4
CASES = cases()

pytestmark = pytest.mark.timeout(660)


@pytest.fixture(scope="module")
def expected() -> dict[str, Answer]:
    """For each setting, what the reference has."""
    lm = sharp_llama()
    groups = mixed_groups(lm)
    answers = {name: plain_step(lm, groups, options) for name, options in SETTINGS.items()}
    scored = scored_by(sharp_llama(seed=REFERENCE_SEED), groups)
    answers["own_reference"] = plain_step(lm, scored, SETTINGS["own_reference"])
    answers["second_epoch"] = two_plain_steps(lm, groups, SETTINGS["second_epoch"])
    return answers


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["1rank", "2ranks", "4ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture(scope="module")
def found(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """For each case, what that many ranks have. All cases run in the same processes."""
    out_dir = tmp_path_factory.mktemp(f"ranks{ranks}")
    sharp_llama().save_pretrained(out_dir / "model")
    sharp_llama(seed=REFERENCE_SEED).save_pretrained(out_dir / "reference")
    done = run_ranks(gradient_worker.main, str(out_dir), ranks=ranks, timeout_s=600)
    assert done.returncode == 0, done.output
    answers: dict[str, dict[str, Any]] = torch.load(out_dir / "found.pt")
    return {name: Answer(**values) for name, values in answers.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_the_plain_reference(case: Case, found: dict[str, Answer], expected: dict[str, Answer]) -> None:
    ours, plain = found[str(case)], expected[case.setting]

    assert ours.loss == pytest.approx(plain.loss, rel=TOLERANCE)
    assert relative_error(ours.gradients, plain.gradients) < TOLERANCE


def test_the_layouts_are_what_they_are_called(ranks: int, found: dict[str, Answer]) -> None:
    passes = {layout: found[str(Case("torch", "default", layout))].passes for layout in LAYOUTS}

    assert len(passes["packed_shared_one"]) == len(passes["packed_one"]) == 1
    assert len(passes["packed_shared_many"]) > 1
    assert len(passes["packed_many"]) < len(passes["unpacked"])
    assert sum(passes["packed_shared_one"]) < sum(passes["packed_one"])
    if ranks == 1:
        # Twelve sequences: one is masked, and one has no advantage.
        assert len(passes["unpacked"]) == 10


def test_no_two_settings_have_the_same_gradient(expected: dict[str, Answer]) -> None:
    for (one, first), (other, second) in combinations(expected.items(), 2):
        assert relative_error(first.gradients, second.gradients) > 0.01, (one, other)
