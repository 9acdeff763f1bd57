"""Two tokenizations of one text are cut into the shortest spans that both have."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.testing.byte_tokenizer import byte_tokenizer
from trainer.supervised.alignment import Span, character_ends, common_spans, span_of_each

TOKENIZER = byte_tokenizer()


def ends_of(cuts: set[int], length: int) -> list[int]:
    return sorted({*(cut for cut in cuts if cut < length), length})


def test_the_same_tokens_are_spans_of_one_token() -> None:
    assert common_spans([2, 3, 7], [2, 3, 7]) == [Span((i, i + 1), (i, i + 1)) for i in range(3)]


def test_a_span_ends_where_both_end_a_token() -> None:
    # "hello world": hel|lo| wor|ld and hello| |world
    assert common_spans([3, 5, 9, 11], [5, 6, 11]) == [Span((0, 2), (0, 1)), Span((2, 4), (1, 3))]


def test_pieces_of_one_character_stay_together() -> None:
    # One character in three pieces, then one letter; the other side has a token for each.
    assert common_spans([0, 0, 1, 2], [1, 2]) == [Span((0, 3), (0, 1)), Span((3, 4), (1, 2))]


def test_what_follows_the_last_common_end_is_in_no_span() -> None:
    spans = common_spans([2, 4], [2, 3])

    assert spans == [Span((0, 1), (0, 1))]
    assert span_of_each(spans, 2) == [0, -1]


def test_nothing_aligns_with_nothing() -> None:
    assert common_spans([], []) == []
    assert common_spans([], [1]) == []


def test_falling_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="must not fall"):
        common_spans([3, 2], [3])


@st.composite
def two_tokenizations(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    length = draw(st.integers(1, 12))
    cuts = st.sets(st.integers(1, 12))
    one, other = ends_of(draw(cuts), length), ends_of(draw(cuts), length)
    doubled = draw(st.sets(st.integers(0, 11)))
    # Some characters in several pieces.
    return [end for i, end in enumerate(one) for _ in range(2 if i in doubled else 1)], other


@given(two_tokenizations())
def test_spans_are_a_partition_of_both_sides_with_equal_ends(ends: tuple[list[int], list[int]]) -> None:
    student, teacher = ends
    spans = common_spans(student, teacher)

    for side, tokens in (("student", student), ("teacher", teacher)):
        edges = [getattr(span, side) for span in spans]
        assert edges[0][0] == 0
        assert edges[-1][1] == len(tokens)
        assert all(before[1] == after[0] for before, after in pairwise(edges))
        assert all(start < stop for start, stop in edges)
    assert all(student[span.student[1] - 1] == teacher[span.teacher[1] - 1] for span in spans)


@given(two_tokenizations())
def test_no_span_could_be_cut_again(ends: tuple[list[int], list[int]]) -> None:
    student, teacher = ends
    for span in common_spans(student, teacher):
        inner = [set(side[start:stop]) for side, (start, stop) in ((student, span.student), (teacher, span.teacher))]
        last = student[span.student[1] - 1]
        assert (inner[0] & inner[1]) - {0, last} == set()


@given(two_tokenizations())
def test_sides_can_be_exchanged(ends: tuple[list[int], list[int]]) -> None:
    student, teacher = ends
    exchanged = [Span(span.teacher, span.student) for span in common_spans(teacher, student)]

    assert common_spans(student, teacher) == exchanged


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12))
def test_ends_of_sampled_ids_rise_to_the_whole_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)

    found, ends = character_ends(ids, TOKENIZER.decode)

    assert found == text
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == len(text)


def test_a_character_of_several_tokens_is_there_with_the_last_of_them() -> None:
    ids = TOKENIZER.encode("a€b", add_special_tokens=False)

    assert character_ends(ids, TOKENIZER.decode) == ("a€b", [1, 1, 1, 2, 3])


def test_bytes_that_are_no_text_end_with_the_last_token() -> None:
    half = TOKENIZER.encode("€", add_special_tokens=False)[:2]

    text, ends = character_ends(half, TOKENIZER.decode)

    assert ends[-1] == len(text)
