"""Which sequences of a group become training examples, and how their text is cut."""

from __future__ import annotations

import os.path
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.cli.group_texts import Candidate, candidates, common_prefix, dpo_lines, sft_lines, split_texts
from atroposlib.errors import AtroposError


class Letters:
    """One token a letter."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def group(*texts: str, scores: list[float] | None = None, prompt: int = 3) -> dict[str, Any]:
    rows = [[ord(letter) for letter in text] for text in texts]
    return {
        "tokens": rows,
        "masks": [[-100] * prompt + row[prompt:] for row in rows],
        "scores": scores or [float(i) for i in range(len(texts))],
    }


def best_first(*scores: float) -> list[Candidate]:
    return [Candidate(score, "p", f"c{score}") for score in sorted(scores, reverse=True)]


@given(st.lists(st.text(alphabet="ab", max_size=6), max_size=4))
def test_the_common_prefix_is_the_longest_there_is(texts: list[str]) -> None:
    assert common_prefix(texts) == os.path.commonprefix(texts)  # noqa: RUF071 - what is wanted here is letters


@pytest.mark.parametrize(
    ("texts", "prefix", "completions"),
    [
        (("Q: yes", "Q: no"), "Q: ", ["yes", "no"]),
        (("Q: yes", "Q: yet"), "Q: ye", ["s", "t"]),
        (("Q: yes", "Q: yes"), "Q: ", ["yes", "yes"]),
        (("Q: a", "Q: ab"), "Q: ", ["a", "ab"]),
        (("Q: a",), "Q: ", ["a"]),
        (("xyz", "abc"), "", ["xyz", "abc"]),
    ],
)
def test_every_sequence_keeps_a_completion_and_no_letter_is_lost(
    texts: tuple[str, ...], prefix: str, completions: list[str]
) -> None:
    assert split_texts(group(*texts), Letters()) == (prefix, completions)


@pytest.mark.parametrize(
    ("scores", "options", "kept"),
    [
        ((3, 1, 2), {"top_n": 2}, [3, 2]),
        ((1, 0, -1), {}, [1]),
        ((1, 0, -1), {"is_negative_allowed": True}, [1, 0, -1]),
        ((1, 0.75, 0.5), {"minimum_diff": 0.25}, [1]),
        ((0.5, 0.5), {}, [0.5, 0.5]),
        ((0.5, 0.5), {"minimum_diff": 0.1}, []),
        ((), {}, []),
    ],
)
def test_the_best_of_a_group_are_kept_best_first(
    scores: tuple[float, ...], options: dict[str, Any], kept: list[float]
) -> None:
    settings = {"top_n": 3, "minimum_diff": 0.0, "is_negative_allowed": False, **options}

    lines = sft_lines(best_first(*scores), **settings)

    assert [line["score"] for line in lines] == kept
    assert lines == [{"prefix": "p", "completion": f"c{score}", "score": score} for score in kept]


@given(
    scores=st.lists(st.integers(-2, 3).map(float), min_size=1, max_size=6),
    n_pairs=st.integers(1, 4),
    diff=st.sampled_from([0.0, 0.5, 1.0]),
    is_negative_allowed=st.booleans(),
)
def test_the_better_side_of_a_pair_is_better_by_more_than_the_distance(
    scores: list[float], n_pairs: int, diff: float, is_negative_allowed: bool
) -> None:
    ordered = best_first(*scores)
    lines = dpo_lines(
        ordered, n_pairs=n_pairs, minimum_diff=diff, is_negative_allowed=is_negative_allowed, draw=random.Random(0)
    )
    of_content = {candidate.content: candidate.score for candidate in ordered}
    worst = [candidate.content for candidate in ordered[-n_pairs:]]

    assert len(lines) <= n_pairs
    for line in lines:
        assert set(line) == {"prefix", "pos", "score", "neg"}
        assert of_content[line["neg"]] < line["score"] - diff
        assert line["neg"] in worst
        assert is_negative_allowed or line["score"] > 0
    if ordered[0].score > max(0.0, ordered[-1].score + diff):
        assert lines, "the best and the worst are a pair"


def test_messages_are_written_as_they_are() -> None:
    chats = [[{"role": "assistant", "content": "bad"}], "a text"]
    found = candidates({**group("a", "b"), "messages": chats}, None)

    assert sft_lines(found, top_n=2, minimum_diff=0, is_negative_allowed=True) == [
        {"messages": "a text", "score": 1.0},
        {"messages": chats[0], "score": 0.0},
    ]
    [pair] = dpo_lines(found, n_pairs=1, minimum_diff=0, is_negative_allowed=False, draw=random.Random(0))
    assert pair == {"pos": "a text", "score": 1.0, "neg": chats[0]}


def test_groups_without_messages_name_the_option_that_gives_them() -> None:
    with pytest.raises(AtroposError, match="--include_messages true"):
        candidates({**group("a"), "messages": None}, None)
