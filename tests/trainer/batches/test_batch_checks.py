"""What is trained on of a batch that is not as it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.wire.columns import Group, build_group
from trainer.batches import checks as batch_checks
from trainer.batches.checks import BatchLimits, checked
from trainer.batches.step_batch import build_step_batch
from trainer.errors import ForeignTokensError

LIMITS = BatchLimits(vocabulary=32)


def a_group(group_id: str = "g", *, completions: Sequence[Sequence[int]] = ((7, 3), (4, 5, 6)), **facts: Any) -> Group:
    """Each sequence is the prompt 1, 2 and a completion."""
    return build_group(
        group_id=group_id,
        env_id=3,
        tokens=[[1, 2, *completion] for completion in completions],
        loss_masks=[[0, 0] + [1] * len(completion) for completion in completions],
        inference_logprobs=[[0.0, 0.0] + [-1.0] * len(completion) for completion in completions],
        versions=[[(0, 2 + len(completion))] for completion in completions],
        scores=[float(i) for i in range(len(completions))],
        **facts,
    )


def trained_tokens(*groups: Group, limits: BatchLimits = LIMITS) -> list[int]:
    """Of each sequence that is kept."""
    found = checked(groups, limits)
    batch = build_step_batch(
        0, found.groups, advantage_scale="none", overlong="mask", temperature=1.0, left_out=found.left_out
    )
    return [sequence.trained_tokens for sequence in batch.sequences]


def test_a_sound_batch_is_kept_as_it_is() -> None:
    groups = [a_group("a"), a_group("b")]

    found = checked(groups, LIMITS)

    assert (found.groups, found.left_out, found.findings, found.counters) == (tuple(groups), frozenset(), (), {})


@pytest.mark.parametrize(
    ("facts", "column", "token_id"),
    [
        ({"completions": [(7, 32), (4,)]}, "tokens", 32),
        ({"completions": [(7, -1), (4,)]}, "tokens", -1),
        ({"labels": np.array([-100, -100, 7, 99, -100, -100, 4, 5, 6], dtype=np.int32)}, "labels", 99),
        (
            {
                "distill_token_ids": np.full((9, 2), 40, dtype=np.int32),
                "distill_logprobs": np.full((9, 2), -1.0, dtype=np.float32),
            },
            "distill_token_ids",
            40,
        ),
    ],
    ids=["above", "below", "label", "teacher"],
)
def test_a_foreign_tokenizer_ends_the_run_and_is_named(facts: dict[str, Any], column: str, token_id: int) -> None:
    with pytest.raises(
        ForeignTokensError, match=f"'g' of environment 3: column '{column}' holds the token id {token_id},"
    ):
        checked([a_group(**facts)], LIMITS)


def test_labels_where_nothing_is_trained_may_be_anything() -> None:
    labels = np.array([-100, 999, 7, 3, -100, -100, 4, 5, 6], dtype=np.int32)

    assert checked([a_group(labels=labels)], LIMITS).findings == ()


def with_column(name: str, value: Any) -> Group:
    return replace(a_group(), **{name: value})


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (with_column("loss_mask", np.ones(8, dtype=np.uint8)), "column 'loss_mask' has 8 entries for 9 tokens"),
        (with_column("advantages", np.ones(2, dtype=np.float32)), "column 'advantages' has 2 entries for 9 tokens"),
        (with_column("scores", np.ones(3)), "3 scores for 2 sequences"),
        (with_column("cu_seqlens", np.array([0, 4, 8], dtype=np.int32)), "cu_seqlens must rise from 0 to 9"),
        (with_column("cu_seqlens", np.array([0, 0, 9], dtype=np.int32)), "cu_seqlens must rise from 0 to 9"),
        (with_column("policy_versions", np.array([[0, 5]], dtype=np.int32)), "policy_versions cover 5 of 9 tokens"),
        (with_column("finish_reasons", ("stop",)), "1 finish_reasons for 2 sequences"),
        (with_column("overrides", [{"sft": True}]), "1 overrides for 2 sequences"),
        (with_column("scores", np.array([0.0, np.inf])), "sequence 1 has the score inf"),
    ],
    ids=["mask", "advantages", "scores", "short", "empty", "versions", "reasons", "overrides", "infinite"],
)
def test_a_group_whose_columns_contradict_each_other_is_left_out(group: Group, reason: str) -> None:
    sound = a_group("sound")

    found = checked([group, sound], LIMITS)

    assert found.groups == (sound,)
    assert found.counters == {batch_checks.LEFT_OUT_GROUPS: 1.0}
    assert f"group 'g' of environment 3: left out: {reason}" in found.findings[0].text


def test_candidates_without_a_probability_each_leave_the_group_out() -> None:
    group = a_group(
        distill_token_ids=np.zeros((9, 2), dtype=np.int32), distill_logprobs=np.zeros((9, 1), dtype=np.float32)
    )

    assert checked([group], LIMITS).groups == ()


@pytest.mark.parametrize("column", ["inference_logprobs", "advantages", "ref_logprobs"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_costs_its_sequence_its_loss(column: str, value: float) -> None:
    numbers = np.zeros(9, dtype=np.float32)
    numbers[3] = value
    group = with_column(column, numbers)

    assert trained_tokens(a_group("before"), group) == [2, 3, 0, 3]
    assert checked([group], LIMITS).counters == {batch_checks.LEFT_OUT_SEQUENCES: 1.0}


def test_a_number_that_is_none_in_the_prompt_harms_nobody() -> None:
    numbers = np.zeros(9, dtype=np.float32)
    numbers[[0, 5]] = np.nan

    assert trained_tokens(replace(a_group(), advantages=numbers)) == [2, 3]


def test_places_of_sequences_count_among_the_groups_that_are_kept() -> None:
    broken = with_column("scores", np.array([0.0, np.nan]))
    numbers = np.zeros(9, dtype=np.float32)
    numbers[7] = np.nan

    assert trained_tokens(broken, replace(a_group("second"), advantages=numbers)) == [2, 0]


def test_a_sequence_beyond_the_models_context_gets_no_loss_and_is_named() -> None:
    limits = replace(LIMITS, context=4)

    assert trained_tokens(a_group(), limits=limits) == [2, 0]
    (finding,) = checked([a_group()], limits).findings
    assert (
        "group 'g' of environment 3, sequence 1: gets no loss: 5 tokens, and the model has positions for 4"
        in finding.text
    )


def test_the_reward_of_a_sequence_without_a_loss_counts_for_the_others() -> None:
    found = checked([a_group()], replace(LIMITS, context=4))
    batch = build_step_batch(
        0, found.groups, advantage_scale="none", overlong="mask", temperature=1.0, left_out=found.left_out
    )

    assert batch.sequences[0].advantages_L[0] == -0.5


@pytest.mark.parametrize(
    ("group", "limits", "metric", "trained"),
    [
        (replace(a_group(), inference_logprobs=None), LIMITS, batch_checks.UNCORRECTED, [2, 3]),
        (a_group(), replace(LIMITS, pass_tokens=3), batch_checks.OWN_PASS, [2, 3]),
        (a_group(completions=[(), ()]), LIMITS, batch_checks.NO_COMPLETION, [0, 0]),
    ],
    ids=["no-logprobs", "long", "empty"],
)
def test_what_can_be_trained_is_trained_and_counted(
    group: Group, limits: BatchLimits, metric: str, trained: list[int]
) -> None:
    assert checked([group], limits).counters == {metric: 2.0}
    assert trained_tokens(group, limits=limits) == trained


def test_logprobs_are_missed_only_where_something_is_corrected_with_them() -> None:
    group = replace(a_group(), inference_logprobs=None)
    learnt = replace(group, overrides=[{"sft": True}, None])

    assert checked([group], replace(LIMITS, needs_inference_logprobs=False)).findings == ()
    assert checked([learnt], LIMITS).counters == {batch_checks.UNCORRECTED: 1.0}
    assert checked([replace(group, group_overrides={"sft": True})], LIMITS).findings == ()


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
    ],
)  # fmt: skip
def test_sampling_from_another_distribution_is_told_unless_the_logprobs_are_of_that(params: dict[str, float]) -> None:
    group = a_group(generation_params={"temperature": 0.7, **params})

    (finding,) = checked([group], LIMITS).findings

    ((name, value),) = params.items()
    assert finding.metric == batch_checks.RESHAPED
    assert f"sampled with {name}={value}, and it is not known" in finding.text
    assert trained_tokens(group) == [2, 3]
    assert checked([group], replace(LIMITS, has_sampled_logprobs=True)).findings == ()


@pytest.mark.parametrize(
    "params",
    [
        None, {}, {"temperature": 0.7}, {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        {"top_p": 1, "top_k": 0}, {"top_p": None, "top_k": None, "presence_penalty": 0},
    ],
)  # fmt: skip
def test_sampling_from_the_policy_itself_is_not_told(params: dict[str, Any] | None) -> None:
    assert checked([a_group(generation_params=params)], LIMITS).findings == ()


DAMAGES: dict[str, Callable[[Group, int], Group]] = {
    "none": lambda group, place: group,
    "score": lambda group, place: replace(group, scores=np.full(group.n_sequences, np.nan)),
    "advantage": lambda group, place: replace(group, advantages=_nan_at(group, place)),
    "logprobs": lambda group, place: replace(group, inference_logprobs=None),
    "mask": lambda group, place: replace(group, loss_mask=group.loss_mask[:-1]),
}


def _nan_at(group: Group, place: int) -> np.ndarray[Any, Any]:
    numbers = np.ones(group.n_tokens, dtype=np.float32)
    numbers[place % group.n_tokens] = np.nan
    return numbers


@given(
    damages=st.lists(st.tuples(st.sampled_from(sorted(DAMAGES)), st.integers(0, 20)), min_size=1, max_size=5),
    context=st.none() | st.integers(3, 6),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_whatever_is_sent_what_is_trained_is_finite_and_fits(
    damages: list[tuple[str, int]], context: int | None, lengths: list[int]
) -> None:
    groups = [
        DAMAGES[kind](a_group(f"g{i}", completions=[[5] * length for length in lengths]), place)
        for i, (kind, place) in enumerate(damages)
    ]

    found = checked(groups, replace(LIMITS, context=context))

    assert len(found.groups) + found.counters.get(batch_checks.LEFT_OUT_GROUPS, 0) == len(groups)
    if not found.groups:
        return
    batch = build_step_batch(
        0, found.groups, advantage_scale="none", overlong="mask", temperature=1.0, left_out=found.left_out
    )
    for sequence in batch.sequences:
        assert np.isfinite(sequence.advantages_L[sequence.is_trained_L]).all()
        assert context is None or not sequence.trained_tokens or len(sequence.tokens_L) <= context
