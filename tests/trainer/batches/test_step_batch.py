"""From leased groups to sequences and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atroposlib.wire.columns import Group
from tests.trainer.fakes import a_group, random_groups
from trainer.batches.micro_batch import MicroBatch, build_micro_batch, cut, share_of_rank
from trainer.batches.prompt_sharing import Cluster, cluster
from trainer.batches.step_batch import StepBatch, build_step_batch, overlong_penalty
from trainer.errors import StalenessError, TrainerError
from trainer.reporting.metrics import batch_metrics


def batch_of(*groups: Group, step: int = 0, **options: Any) -> StepBatch:
    defaults: dict[str, Any] = {"advantage_scale": "none", "overlong": "mask", "temperature": 1.0}
    return build_step_batch(step, groups, **{**defaults, **options})


def laid_out(batch: StepBatch, *, shares_prompts: bool = True) -> list[Cluster]:
    return cluster(batch.sequences, range(len(batch.sequences)), capacity=1000, shares_prompts=shares_prompts)


def all_micro_batches(batch: StepBatch, *, ranks: int, max_tokens: int) -> list[MicroBatch]:
    return [
        micro_batch
        for rank in range(ranks)
        for micro_batch in share_of_rank(
            batch,
            rank=rank,
            ranks=ranks,
            max_tokens=max_tokens,
            hidden_size=16,
            aggregation="token_mean",
            max_completion_length=None,
            shares_prompts=True,
        ).micro_batches
    ]


def test_only_sampled_tokens_are_trained() -> None:
    batch = batch_of(a_group("g", prompt=(1, 2), completions=[(7, 3), (4, 5, 6)]))

    assert [s.is_trained_L.tolist() for s in batch.sequences] == [
        [False, False, True, True],
        [False, False, True, True, True],
    ]
    assert batch.trained_tokens == 5


def test_a_sampled_first_token_has_no_context_and_is_not_trained() -> None:
    batch = batch_of(a_group("g", prompt=(), completions=[(7, 3), (4, 5)]))

    assert batch.trained_tokens == 2


def test_an_overlong_sequence_gets_no_loss_but_its_reward_counts() -> None:
    group = a_group("g", rewards=[1.0, 0.0], finish_reasons=("length", "stop"))

    masked, kept = batch_of(group), batch_of(group, overlong="keep")

    assert [s.trained_tokens for s in masked.sequences] == [0, 3]
    assert [s.trained_tokens for s in kept.sequences] == [2, 3]
    assert batch_metrics(masked)["reward/mean"] == 0.5
    assert batch_metrics(masked)["completion/truncated_frac"] == 0.5
    assert masked.sequences[1].advantages_L.tolist() == [-0.5] * 5


def test_an_environments_own_advantages_win() -> None:
    own = np.arange(9, dtype=np.float32)

    batch = batch_of(a_group("g", advantages=own))

    assert np.concatenate([s.advantages_L for s in batch.sequences]).tolist() == own.tolist()


def test_an_override_sets_the_advantage_to_zero() -> None:
    batch = batch_of(a_group("g", overrides=[{"set_advantage_to_zero": True}, None]))

    assert batch.sequences[0].advantages_L.tolist() == [0.0] * 4
    assert batch.sequences[1].advantages_L.tolist() == [-0.5] * 5


@pytest.mark.parametrize(
    ("params", "expected"), [(None, 0.7), ({}, 0.7), ({"temperature": 1.3}, 1.3), ({"temperature": 0}, 1.0)]
)
def test_the_temperature_is_the_groups_own(params: dict[str, float] | None, expected: float) -> None:
    batch = batch_of(a_group("g", generation_params=params), temperature=0.7)

    assert {s.temperature for s in batch.sequences} == {expected}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"overrides": [{"temperature": 0.4}, None], "generation_params": {"temperature": 1.3}}, [0.4, 1.3]),
        ({"group_overrides": {"temperature": 0.9}}, [0.9, 0.9]),
    ],
)
def test_a_sequences_own_temperature_wins_over_its_groups(facts: dict[str, Any], expected: list[float]) -> None:
    batch = batch_of(a_group("g", **facts))

    assert [s.temperature for s in batch.sequences] == expected


def test_logprobs_may_be_left_at_temperature_1() -> None:
    batch = batch_of(a_group("g", generation_params={"temperature": 1.3}), unbias_log_probabilities=False)

    assert {s.temperature for s in batch.sequences} == {1.0}


def test_a_long_completion_loses_reward_softly_before_advantages_are_taken() -> None:
    group = a_group("g", rewards=[1.0, 1.0], completions=[[3] * 6, [3] * 9], finish_reasons=("stop", "length"))

    batch = batch_of(group, overlong="soft", max_completion_length=10, overlong_cache=4)

    # 0 and 3 of the last 4 tokens: rewards of 1 and 0.25; no token is masked.
    assert [s.advantages_L[-1] for s in batch.sequences] == pytest.approx([0.375, -0.375])
    assert [s.trained_tokens for s in batch.sequences] == [6, 9]
    assert batch_metrics(batch)["reward/mean"] == 1.0


def test_the_soft_penalty_grows_to_1() -> None:
    penalty = overlong_penalty(np.array([0, 6, 8, 10, 30], dtype=np.int32), max_completion_length=10, overlong_cache=4)

    assert penalty.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_half_a_teacher_says_nothing() -> None:
    batch = batch_of(a_group("g", distill_logprobs=np.zeros((9, 2), dtype=np.float32)))

    assert batch.candidates == 0


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_minibatches_hold_each_sequence_once_and_are_the_same_on_every_rank(count: int) -> None:
    batch = batch_of(*random_groups(0, sequences=12), step=5)

    parts = cut(batch, count, seed=1)

    assert sorted(i for part in parts for i in part) == list(range(12))
    assert parts == cut(batch, count, seed=1)
    sizes = [len(part) for part in parts]
    assert len(sizes) == min(count, 12)
    assert max(sizes) - min(sizes) <= 1


def test_minibatches_differ_from_step_to_step_and_keep_groups_together() -> None:
    groups = random_groups(0, sequences=32)

    first, second = (cut(batch_of(*groups, step=step), 2, seed=1) for step in (0, 1))

    assert first != second
    assert not {i // 4 for i in first[0]} & {i // 4 for i in first[1]}


def test_a_batch_within_the_bound_passes() -> None:
    batch_of(a_group("g", version=3), step=7).check_staleness(4)


def test_a_batch_beyond_the_bound_is_refused() -> None:
    batch = batch_of(a_group("fresh", version=8), a_group("old", version=3), step=8)

    with pytest.raises(
        StalenessError, match=r"step 8: group 'old' .* version 3, which is 5 versions old.*max_staleness=4"
    ):
        batch.check_staleness(4)


def test_tokens_of_unknown_version_are_not_stale() -> None:
    batch = batch_of(a_group("legacy", version=-1), step=50)

    batch.check_staleness(0)
    assert batch.staleness() == []


def test_an_empty_batch_is_an_error() -> None:
    with pytest.raises(TrainerError, match="empty batch"):
        batch_of()


def test_each_target_is_predicted_from_the_position_before_it() -> None:
    batch = batch_of(a_group("g", prompt=(1, 2), completions=[(7, 3), (4, 5, 6)]))

    micro = build_micro_batch(batch.sequences, laid_out(batch, shares_prompts=False), [0.25, 0.5])

    assert micro.input_ids_1T.tolist() == [[1, 2, 7, 3, 1, 2, 4, 5, 6]]
    assert micro.position_ids_1T.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert micro.target_positions_M.tolist() == [1, 2, 5, 6, 7]
    assert micro.target_ids_M.tolist() == [7, 3, 4, 5, 6]
    assert micro.loss_weights_M.tolist() == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert micro.advantages_M.tolist() == [0.5, 0.5, -0.5, -0.5, -0.5]
    assert micro.inference_logprobs_M.tolist() == [-1.0] * 5
    assert micro.has_inference_logprobs_M.all()


def test_a_shared_prompt_is_laid_down_once_and_predicts_every_first_token() -> None:
    batch = batch_of(a_group("g", prompt=(1, 2), completions=[(7, 3), (4, 5, 6)]))

    micro = build_micro_batch(batch.sequences, laid_out(batch), [0.25, 0.5])

    assert micro.input_ids_1T.tolist() == [[1, 2, 7, 3, 4, 5, 6]]
    assert micro.position_ids_1T.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert micro.segments_1T.tolist() == [[0, 0, 1, 1, 2, 2, 2]]
    assert micro.prefixes_1T.tolist() == [[0, 0, 0, 0, 0, 0, 0]]
    assert micro.target_positions_M.tolist() == [1, 2, 1, 4, 5]
    assert micro.target_ids_M.tolist() == [7, 3, 4, 5, 6]


def test_a_sender_without_logprobs_is_not_corrected() -> None:
    group = a_group("g")
    batch = batch_of(Group(**{**vars(group), "inference_logprobs": None}))

    micro = build_micro_batch(batch.sequences, laid_out(batch), [1.0, 1.0])

    assert not micro.has_inference_logprobs_M.any()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [8, 30, 1000])
def test_the_shares_of_all_ranks_hold_each_trained_token_once(ranks: int, max_tokens: int) -> None:
    batch = batch_of(*random_groups(0, sequences=8))

    micro_batches = all_micro_batches(batch, ranks=ranks, max_tokens=max_tokens)

    weights = torch.cat([micro.loss_weights_M for micro in micro_batches])
    assert int((weights > 0).sum()) == batch.trained_tokens
    assert float(weights.sum()) == pytest.approx(1.0)


def test_a_rank_without_sequences_gets_passes_that_weigh_nothing() -> None:
    batch = batch_of(a_group("g", completions=[(7,), (8,)]))

    shares = all_micro_batches(batch, ranks=4, max_tokens=100)

    assert len(shares) == 4
    assert sorted(float(micro.loss_weights_M.sum()) for micro in shares) == pytest.approx([0.0, 0.0, 0.5, 0.5])


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_batch_that_is_all_overlong_makes_no_pass_on_any_rank(ranks: int) -> None:
    batch = batch_of(a_group("g", finish_reasons=("length", "length")))

    assert all_micro_batches(batch, ranks=ranks, max_tokens=100) == []
