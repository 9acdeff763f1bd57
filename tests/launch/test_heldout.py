"""What changed between two evaluations, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.launch.heldout import Change, heldout_change


def an_evaluation(folder: Path, scores: Sequence[float], *, reward: float | None = None, **sample: Any) -> Path:
    """Of as many items, each called by its place."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"results": {"all": {"heldout_reward": fmean(scores) if reward is None else reward}}}
    (folder / "metrics.json").write_text(json.dumps(results))
    lines = [{"question": f"{place}", "score": score, **sample} for place, score in enumerate(scores)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def change_of(tmp_path: Path, before: Sequence[float], after: Sequence[float]) -> Change | None:
    return heldout_change(an_evaluation(tmp_path / "before", before), an_evaluation(tmp_path / "after", after))


def test_the_change_is_that_of_pairs(tmp_path: Path) -> None:
    # Items differ much, and each gains the same: nothing is uncertain.
    scores = [0.0, 0.5] * 20

    assert change_of(tmp_path, scores, [score + 0.25 for score in scores]) == Change(0.25, 0.25, 0.25, 40)


def test_the_interval_is_that_of_the_normal_distribution_where_items_are_many(tmp_path: Path) -> None:
    change = change_of(tmp_path, [0.0] * 400, [1.0] * 100 + [0.0] * 300)

    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert change is not None
    assert (change.mean, change.items) == (0.25, 400)
    assert (change.low, change.high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.005)
    assert str(Change(0.25, -0.1, 0.4, 9)) == "+0.250, 95 % -0.100 to +0.400"


def test_environments_weigh_the_same_however_many_items_they_have(tmp_path: Path) -> None:
    for phase, (few, many) in {"before": (0.0, 0.0), "after": (1.0, 0.0)}.items():
        an_evaluation(tmp_path / phase / "a", [few] * 2)
        an_evaluation(tmp_path / phase / "b", [many] * 8)

    assert heldout_change(tmp_path / "before", tmp_path / "after") == Change(0.5, 0.5, 0.5, 10)


def test_a_sample_may_say_what_it_adds_to_the_reward(tmp_path: Path) -> None:
    # As where a score is compared with a baseline.
    before = an_evaluation(tmp_path / "before", [1.0, 1.0], reward=-0.5, heldout_reward=-0.5)
    after = an_evaluation(tmp_path / "after", [1.0, 1.0], reward=0.25, heldout_reward=0.25)

    assert heldout_change(before, after) == Change(0.75, 0.75, 0.75, 2)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=30))
def test_the_mean_lies_in_its_interval(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[float, float]]
) -> None:
    before, after = zip(*pairs, strict=True)

    change = change_of(tmp_path_factory.mktemp("run"), before, after)

    assert change is not None
    assert change.low - 1e-4 <= change.mean <= change.high + 1e-4


def test_evaluations_that_cannot_be_paired_have_no_interval(tmp_path: Path) -> None:
    before = an_evaluation(tmp_path / "before", [0.0, 1.0])
    fewer = an_evaluation(tmp_path / "fewer", [0.0])
    of_other_items = an_evaluation(tmp_path / "other", [0.0, 1.0], question="another")
    not_the_mean_of_its_samples = an_evaluation(tmp_path / "weighted", [0.0, 1.0], reward=0.9)
    without_scores = an_evaluation(tmp_path / "words", [0.0, 1.0], score="good")
    without_samples = an_evaluation(tmp_path / "alone", [0.0, 1.0])
    (without_samples / "samples.jsonl").unlink()
    two_environments = tmp_path / "two"
    an_evaluation(two_environments / "a", [0.0, 1.0])

    for after in (
        fewer, of_other_items, not_the_mean_of_its_samples, without_scores, without_samples, two_environments,
        tmp_path / "nothing",
    ):  # fmt: skip
        assert heldout_change(before, after) is None, after
        assert heldout_change(after, before) is None, after
