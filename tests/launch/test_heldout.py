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

from atroposlib.launch.heldout import MIN_ITEMS, Change, heldout_change, heldout_rewards, rewards_text


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


def test_rewards_are_told_with_the_whole_name_of_their_environment(tmp_path: Path) -> None:
    alone = an_evaluation(tmp_path / "alone", [0.5] * 2)
    for name in ("recall", "all"):
        an_evaluation(tmp_path / "two" / name, [0.25] * 2)

    assert rewards_text(heldout_rewards(alone)) == "0.500"
    assert rewards_text(heldout_rewards(tmp_path / "two")) == "all 0.250, recall 0.250"


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
        an_evaluation(tmp_path / phase / "a", [few] * 10)
        an_evaluation(tmp_path / phase / "b", [many] * 40)

    assert heldout_change(tmp_path / "before", tmp_path / "after") == Change(0.5, 0.5, 0.5, 50)


def test_few_items_of_one_environment_leave_the_change_without_an_interval(tmp_path: Path) -> None:
    for phase in ("before", "after"):
        an_evaluation(tmp_path / phase / "a", [0.0] * (MIN_ITEMS - 1))
        an_evaluation(tmp_path / phase / "b", [0.0] * 200)

    assert heldout_change(tmp_path / "before", tmp_path / "after") is None
    assert change_of(tmp_path / "one", [0.0] * (MIN_ITEMS - 1), [1.0] * (MIN_ITEMS - 1)) is None
    assert change_of(tmp_path / "ten", [0.0] * MIN_ITEMS, [1.0] * MIN_ITEMS) is not None


def test_items_are_paired_by_what_they_are_not_by_their_place(tmp_path: Path) -> None:
    before, after = [place / 20 for place in range(20)], [place / 20 + 0.25 for place in range(20)]
    turned = an_evaluation(tmp_path / "after", after)
    lines = (turned / "samples.jsonl").read_text().splitlines(keepends=True)
    (turned / "samples.jsonl").write_text("".join(reversed(lines)))

    change = heldout_change(an_evaluation(tmp_path / "before", before), turned)

    assert change == Change(0.25, 0.25, 0.25, 20)


@pytest.mark.parametrize(
    ("items", "is_paired"),
    [
        ({"question": None, "gold_answer": "7"}, True),
        ({"question": "guess", "gold_answer": [{"constraint": 3}]}, True),
        ({"question": None}, False),
    ],
)
def test_a_sample_that_does_not_say_of_which_item_it_is_is_paired_with_none(
    tmp_path: Path, items: dict[str, Any], is_paired: bool
) -> None:
    before, after = (an_evaluation(tmp_path / phase, [0.5] * 12, **items) for phase in ("before", "after"))

    assert (heldout_change(before, after) is not None) == is_paired


def test_the_gold_answer_tells_items_with_the_same_question_apart(tmp_path: Path) -> None:
    before = an_evaluation(tmp_path / "before", [0.5] * 12, question="guess", gold_answer="7")
    after = an_evaluation(tmp_path / "after", [0.5] * 12, question="guess", gold_answer="8")

    assert heldout_change(before, after) is None


def test_a_sample_may_say_what_it_adds_to_the_reward(tmp_path: Path) -> None:
    # As where a score is compared with a baseline.
    before = an_evaluation(tmp_path / "before", [1.0] * 12, reward=-0.5, heldout_reward=-0.5)
    after = an_evaluation(tmp_path / "after", [1.0] * 12, reward=0.25, heldout_reward=0.25)

    assert heldout_change(before, after) == Change(0.75, 0.75, 0.75, 12)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=MIN_ITEMS, max_size=30))
def test_the_mean_lies_in_its_interval(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[float, float]]
) -> None:
    before, after = zip(*pairs, strict=True)

    change = change_of(tmp_path_factory.mktemp("run"), before, after)

    assert change is not None
    assert change.low - 1e-4 <= change.mean <= change.high + 1e-4


SCORES = [0.0, 1.0] * 10


def test_evaluations_that_cannot_be_paired_have_no_interval(tmp_path: Path) -> None:
    before = an_evaluation(tmp_path / "before", SCORES)
    fewer = an_evaluation(tmp_path / "fewer", SCORES[1:])
    of_other_items = an_evaluation(tmp_path / "other", SCORES, question="another")
    not_the_mean_of_its_samples = an_evaluation(tmp_path / "weighted", SCORES, reward=0.9)
    without_scores = an_evaluation(tmp_path / "words", SCORES, score="good")
    without_samples = an_evaluation(tmp_path / "alone", SCORES)
    (without_samples / "samples.jsonl").unlink()
    two_environments = tmp_path / "two"
    an_evaluation(two_environments / "a", SCORES)

    assert heldout_change(before, an_evaluation(tmp_path / "same", SCORES)) is not None
    for after in (
        fewer, of_other_items, not_the_mean_of_its_samples, without_scores, without_samples, two_environments,
        tmp_path / "nothing",
    ):  # fmt: skip
        assert heldout_change(before, after) is None, after
        assert heldout_change(after, before) is None, after
