"""Packing loses no token, and each counts once over all ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.supervised.examples import Example
from trainer.supervised.passes import Pass, build_pass, idle_pass, passes_of_rank
from trainer.supervised.span_scores import SpanScores


def example(first: int, prompt: int, learnt: int) -> Example:
    """Tokens first, first + 1, ...; those after the prompt are learnt."""
    length = prompt + learnt
    return Example(np.arange(first, first + length, dtype=np.int32), np.arange(length) >= prompt)


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=8)


def all_passes(examples: list[Example], ranks: int, max_tokens: int) -> list[tuple[Pass, ...]]:
    return [
        passes_of_rank(examples, rank=rank, ranks=ranks, max_tokens=max_tokens, hidden_size=16) for rank in range(ranks)
    ]


@given(shapes=shapes, ranks=st.integers(1, 3), max_tokens=st.integers(4, 20))
def test_every_learnt_token_counts_once_over_all_ranks(
    shapes: list[tuple[int, int]], ranks: int, max_tokens: int
) -> None:
    examples = [example(100 * i, prompt, learnt) for i, (prompt, learnt) in enumerate(shapes)]

    shares = all_passes(examples, ranks, max_tokens)

    assert len({len(share) for share in shares}) == 1
    counted = [each for share in shares for each in share]
    ids = torch.cat([each.target_ids_M[each.weights_M > 0] for each in counted])
    expected = [token for each in examples for token in each.tokens_L[each.is_trained_L].tolist()]
    assert sorted(ids.tolist()) == sorted(expected)
    assert float(sum(each.weights_M.sum() for each in counted)) == pytest.approx(1.0, abs=1e-5)


@given(shapes=shapes, max_tokens=st.integers(4, 20))
def test_the_hidden_state_before_a_token_predicts_it(shapes: list[tuple[int, int]], max_tokens: int) -> None:
    examples = [example(100 * i, prompt, learnt) for i, (prompt, learnt) in enumerate(shapes)]

    for each in all_passes(examples, 1, max_tokens)[0]:
        before = each.input_ids_1T[0, each.target_positions_M]
        assert torch.equal(before + 1, each.target_ids_M)
        assert torch.equal(each.position_ids_1T[0], each.input_ids_1T[0] % 100)


def test_an_idle_pass_has_no_weight() -> None:
    assert float(idle_pass().weights_M.sum()) == 0.0


def test_spans_of_examples_are_numbered_on() -> None:
    one, other, without = example(0, 1, 3), example(10, 1, 2), example(20, 1, 1)
    examples = [
        Example(one.tokens_L, one.is_trained_L, spans=SpanScores([0, 0, -1], [-1.5])),
        without,
        Example(other.tokens_L, other.is_trained_L, spans=SpanScores([0, 1], [-2.0, -3.0])),
    ]

    found = build_pass(examples, weight=1.0)

    assert found.spans_M is not None
    assert found.teacher_logprobs_S is not None
    assert found.spans_M.tolist() == [0, 0, -1, -1, 1, 2]
    assert found.teacher_logprobs_S.tolist() == [-1.5, -2.0, -3.0]
