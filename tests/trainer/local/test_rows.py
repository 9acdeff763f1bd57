"""What counts as rows, and the order in which they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import ConfigError
from trainer.local.rows import check_rows, columns_of, endless_rows


def some_rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(n)]


def taken(rows: Any, n: int, **options: Any) -> list[Any]:
    return [row["answer"] for row in islice(endless_rows(rows, **{"seed": 0, **options}), n)]


@given(size=st.integers(1, 12), start=st.integers(0, 40), seed=st.integers(0, 3))
def test_a_run_that_goes_on_takes_the_rows_that_it_would_have_taken(size: int, start: int, seed: int) -> None:
    whole = taken(some_rows(size), start + 20, seed=seed)

    assert taken(some_rows(size), 20, seed=seed, start=start) == whole[start:]


@given(size=st.integers(1, 12), epochs=st.integers(1, 3))
def test_every_epoch_has_every_row_once(size: int, epochs: int) -> None:
    order = taken(some_rows(size), size * epochs)

    for epoch in range(epochs):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(1, size + 1))


def test_the_order_is_the_seeds_and_not_the_lists() -> None:
    first, again, other = (taken(some_rows(50), 50, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert len({tuple(first), tuple(other), tuple(sorted(first))}) == 3


class Streamed:
    """Rows that can be iterated but not indexed."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(some_rows(3))


def test_what_cannot_be_indexed_keeps_its_order_and_begins_again() -> None:
    assert taken(Streamed(), 5) == [1, 2, 3, 1, 2]
    assert taken(Streamed(), 3, start=4) == [2, 3, 1]


def test_an_iterator_that_ends_says_so() -> None:
    with pytest.raises(ConfigError, match="no more rows"):
        taken(iter(some_rows(3)), 4)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no rows"),
        ([{"question": "?", "answer": 1}], "has question, answer"),
        ([{"prompt": ""}], "expected a text, or messages"),
        ([{"prompt": [{"role": "user"}]}], "expected a text, or messages"),
        ({"train": [{"prompt": "a"}]}, "of several splits give one"),
        ("prompts.jsonl", "is a str"),
        (7, "is a int"),
    ],
)
def test_what_is_no_data_set_is_refused_by_name(rows: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=f"eval_dataset.*{told}|{told}.*eval_dataset"):
        check_rows(rows, "eval_dataset")


def test_a_bad_row_further_down_is_named_when_it_is_taken() -> None:
    with pytest.raises(ConfigError, match="row 1 of train_dataset has text"):
        taken([{"prompt": "a", "answer": 1}, {"text": "b"}], 2)


def test_columns_are_all_that_is_not_the_prompt_or_ours() -> None:
    row = {"prompt": "a", "completion": "b", "completion_ids": [1], "answer": 5, "level": None}

    assert columns_of(row) == {"answer": 5, "level": None}
