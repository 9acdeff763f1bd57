"""The loss of a micro batch: each part where it belongs, and nothing that depends on how the batch is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atroposlib.wire.columns import Group
from atroposlib.wire.layout import PADDING_LOGPROB
from tests.trainer.fakes import a_group, random_groups
from trainer.batches.micro_batch import MicroBatch, build_micro_batch, share_of_rank
from trainer.batches.prompt_sharing import cluster
from trainer.batches.step_batch import build_step_batch
from trainer.losses.aggregation import LossAggregation, loss_weights
from trainer.losses.corrections import CorrectionRule
from trainer.losses.objectives import Objective
from trainer.step.loss import LossRule, MicroLoss, micro_loss

NO_CORRECTION = CorrectionRule("none")
REINFORCE = Objective("reinforce")


def cut(groups: Sequence[Group], *, max_tokens: int) -> tuple[MicroBatch, ...]:
    batch = build_step_batch(0, groups, advantage_scale="none", overlong="keep", temperature=1.0)
    return share_of_rank(
        batch,
        rank=0,
        ranks=1,
        max_tokens=max_tokens,
        hidden_size=16,
        aggregation="sequence_mean",
        max_completion_length=None,
        shares_prompts=False,
    ).micro_batches


def one(*groups: Group, aggregation: LossAggregation = "token_mean") -> MicroBatch:
    """All sequences in one micro batch, in their order."""
    batch = build_step_batch(0, groups, advantage_scale="none", overlong="keep", temperature=1.0)
    counts = torch.tensor([sequence.trained_tokens for sequence in batch.sequences])
    index = torch.tensor([sequence.group_index for sequence in batch.sequences])
    weights = loss_weights(counts, index, aggregation=aggregation, max_completion_length=100).tolist()
    whole = cluster(batch.sequences, range(len(counts)), capacity=1000, shares_prompts=False)
    return build_micro_batch(batch.sequences, whole, weights, candidates=batch.candidates)


def loss_of(
    micro: MicroBatch,
    rule: LossRule,
    *,
    logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    candidates: Tensor | None = None,
) -> tuple[MicroLoss, Tensor]:
    """The loss and its gradient with respect to the logprobs."""
    count = len(micro.target_ids_M)
    logprobs_M = (torch.full((count,), -1.0) if logprobs is None else logprobs.clone()).requires_grad_()
    entropies_M = torch.ones(count) if entropies is None else entropies
    loss = micro_loss(micro, logprobs_M, entropies_M, candidates, rule)
    (gradient_M,) = torch.autograd.grad(loss.total, logprobs_M, allow_unused=True, retain_graph=True)
    return loss, torch.zeros(count) if gradient_M is None else gradient_M


@pytest.mark.parametrize(("aggregation", "expected"), [("sequence_mean", 0.0), ("token_mean", 0.8), ("constant", 0.4)])
def test_long_and_short_sequences_weigh_as_the_aggregation_says(aggregation: LossAggregation, expected: float) -> None:
    own = np.array([0, *[1.0] * 10, 0, *[-1.0] * 90], dtype=np.float32)
    group = a_group("g", prompt=(1,), completions=[[3] * 10, [3] * 90], advantages=own)

    loss, _ = loss_of(one(group, aggregation=aggregation), LossRule(REINFORCE, NO_CORRECTION))

    assert loss.total.item() == pytest.approx(expected, abs=1e-6)


def test_the_sum_over_micro_batches_does_not_depend_on_the_cut() -> None:
    groups = [
        group_with(group, ref_logprobs=np.full(group.n_tokens, -1.5, dtype=np.float32))
        for group in random_groups(0, sequences=8)
    ]
    rule = LossRule(Objective("gspo"), CorrectionRule("seq_tis"), beta=0.1, kl_estimator="k3", entropy_coef=0.01)

    def total(max_tokens: int) -> float:
        parts = cut(groups, max_tokens=max_tokens)
        # Logprobs that follow from the token, so that each has its own wherever it lies.
        losses = [loss_of(micro, rule, logprobs=-1 - micro.target_ids_M / 32)[0] for micro in parts]
        return sum(loss.total.item() for loss in losses)

    assert total(1) == pytest.approx(total(24)) == pytest.approx(total(1000))


def group_with(group: Group, **columns: Any) -> Group:
    return Group(**{**vars(group), **columns})


# Reference


def test_the_kl_in_the_loss_is_weighed_by_beta_and_has_a_gradient() -> None:
    group = a_group("g", rewards=[0.0, 0.0], ref_logprobs=np.full(9, -1.1, dtype=np.float32))

    loss, gradient_M = loss_of(one(group), LossRule(REINFORCE, NO_CORRECTION, beta=0.5, kl_estimator="k2"))

    assert float(loss.kl) == pytest.approx(0.005)
    assert loss.total.item() == pytest.approx(0.0025)
    assert gradient_M.tolist() == pytest.approx([0.5 * 0.1 / 5] * 5)


def test_the_kl_in_the_reward_lowers_the_advantage_of_each_token_and_has_no_gradient_of_its_own() -> None:
    group = a_group("g", rewards=[0.0, 0.0], ref_logprobs=np.full(9, -1.1, dtype=np.float32))
    rule = LossRule(REINFORCE, NO_CORRECTION, beta=0.5, kl_estimator="k1", kl_placement="reward")

    loss, gradient_M = loss_of(one(group), rule)

    assert float(loss.policy) == pytest.approx(0.5 * 0.1)
    assert loss.total.item() == pytest.approx(0.5 * 0.1)
    # The policy gradient of A = -beta kl, and nothing else.
    assert gradient_M.tolist() == pytest.approx([0.5 * 0.1 / 5] * 5)


def test_without_beta_the_references_logprobs_change_nothing() -> None:
    plain, brought = a_group("g"), a_group("g", ref_logprobs=np.full(9, -9.0, dtype=np.float32))

    losses = [loss_of(one(group), LossRule())[0] for group in (plain, brought)]

    assert torch.equal(losses[0].total, losses[1].total)
    assert float(losses[1].kl) == 0.0


# Correction


def test_bypass_measures_the_ratio_from_the_engine_and_clips_there() -> None:
    rule = LossRule(Objective("ppo_clip", 0.2, 0.28), CorrectionRule("bypass"))
    micro = one(a_group("g", logprob=-1.5))

    loss, gradient_M = loss_of(micro, rule, logprobs=torch.full((5,), -1.0))

    assert loss.weights_M.tolist() == [1.0] * 5
    assert loss.ratio_M.tolist() == pytest.approx([np.exp(0.5)] * 5)
    # Over 1 + epsilon_high: where the advantage is positive, the gradient is gone.
    assert [bool(g) for g in gradient_M] == [False, False, True, True, True]
    assert loss.clipped_high_M.tolist() == [True, True, False, False, False]


def test_a_ratio_is_measured_from_the_start_of_the_step_where_the_policy_has_moved() -> None:
    micro = one(a_group("g"))
    moved = torch.full((5,), -0.5)

    still, _ = loss_of(micro, LossRule(), logprobs=moved)
    stepped, _ = loss_of(
        MicroBatch(**{**vars(micro), "proximal_logprobs_M": torch.full((5,), -1.0)}), LossRule(), logprobs=moved
    )

    assert still.ratio_M.tolist() == [1.0] * 5
    assert stepped.ratio_M.tolist() == pytest.approx([np.exp(0.5)] * 5)
    assert stepped.weights_M.tolist() == [1.0] * 5  # the engine's -1.0 is what the policy had then


@pytest.mark.parametrize(
    ("correction", "weights", "is_bounded"),
    [
        ("tis", [2.0, 1.0, 0.1], [True, False, False]),
        ("mis", [3.0, 1.0, 0.0], [False, False, True]),
        ("none", [1.0, 1.0, 1.0], [False, False, False]),
    ],
)
def test_the_figures_tell_which_weights_a_bound_decided(
    correction: Any, weights: list[float], is_bounded: list[bool]
) -> None:
    micro = one(a_group("g", completions=[(7, 3, 4)], rewards=[1.0]))
    ratios = torch.tensor([3.0, 1.0, 0.1])

    loss, _ = loss_of(micro, LossRule(correction=CorrectionRule(correction)), logprobs=-1.0 + ratios.log())

    assert loss.weights_M.tolist() == pytest.approx(weights)
    assert loss.is_bounded_M.tolist() == is_bounded


def test_a_sender_without_logprobs_is_neither_corrected_nor_bypassed() -> None:
    micro = one(group_with(a_group("g"), inference_logprobs=None))

    for correction in ("tis", "mis", "seq_tis", "seq_mis", "bypass"):
        loss, _ = loss_of(micro, LossRule(correction=CorrectionRule(correction)), logprobs=torch.full((5,), -7.0))
        assert loss.weights_M.tolist() == [1.0] * 5
        assert loss.ratio_M.tolist() == [1.0] * 5


# Entropy, supervised tokens


def test_entropy_is_made_larger() -> None:
    entropies_M = torch.full((5,), 2.0, requires_grad=True)

    loss, _ = loss_of(one(a_group("g", rewards=[0.0, 0.0])), LossRule(entropy_coef=0.1), entropies=entropies_M)
    loss.total.backward()

    assert loss.total.item() == pytest.approx(-0.2)
    assert entropies_M.grad is not None
    assert entropies_M.grad.tolist() == pytest.approx([-0.1 / 5] * 5)


def test_a_supervised_sequence_is_learnt_as_it_is_whatever_its_reward() -> None:
    group = a_group("g", rewards=[0.0, 1.0], overrides=[{"sft": True}, None])

    loss, gradient_M = loss_of(one(group), LossRule(REINFORCE, NO_CORRECTION), logprobs=torch.full((5,), -3.0))

    assert float(loss.supervised) == pytest.approx(3.0 * 2 / 5)
    assert float(loss.policy) == pytest.approx(-0.5 * 3 / 5)
    assert gradient_M.tolist() == pytest.approx([-1 / 5] * 2 + [-0.5 / 5] * 3)
    assert loss.is_policy_M.tolist() == [False, False, True, True, True]


def test_a_label_that_differs_from_its_token_is_the_target() -> None:
    group = a_group("g", prompt=(1, 2), completions=[(7, 3)], rewards=[1.0], labels=np.array([1, 2, 9, 3]))

    micro = one(group)

    assert micro.input_ids_1T.tolist() == [[1, 2, 7, 3]]
    assert micro.target_ids_M.tolist() == [9, 3]
    assert micro.is_supervised_M.tolist() == [True, False]


# Distillation


def taught(ids: list[list[int]], logprobs: list[list[float]], **options: Any) -> MicroBatch:
    """Two sampled tokens, 7 and 3, of one sequence, with a teacher's candidates for each."""
    prompt = [[0] * len(ids[0])] * 2
    return one(
        a_group(
            "g",
            prompt=(1, 2),
            completions=[(7, 3)],
            rewards=[1.0],
            distill_token_ids=np.array(prompt + ids, dtype=np.int32),
            distill_logprobs=np.array(prompt + logprobs, dtype=np.float32),
            **options,
        )
    )


def test_the_divergence_from_the_teacher_is_weighed_and_leaves_out_places_without_candidates() -> None:
    teacher, student = np.log([0.4, 0.6]).tolist(), torch.tensor([0.7, 0.3]).log()
    micro = taught([[7, 4], [0, 0]], [teacher, [PADDING_LOGPROB] * 2])

    loss, _ = loss_of(micro, LossRule(distill_coef=2.0, distill_beta=0.5), candidates=torch.stack([student, student]))

    assert float(loss.distill) == pytest.approx(0.046201 / 2, abs=1e-6)
    assert loss.total.item() == pytest.approx(0.046201, abs=1e-6)


@pytest.mark.parametrize(("mode", "width"), [("policy_gradient", 2), ("jsd", 1)])
def test_the_sampled_tokens_log_ratio_to_the_teacher_is_an_advantage(mode: Any, width: int) -> None:
    micro = taught([[7, 4][:width], [9, 8][:width]], [[-0.5, -3.0][:width]] * 2)
    rule = LossRule(REINFORCE, NO_CORRECTION, distill_coef=2.0, gkd_mode=mode)

    loss, gradient_M = loss_of(micro, rule, logprobs=torch.tensor([-1.5, -1.5]))

    # The teacher is 1 nat above the policy at the first token, and does not name the second.
    assert gradient_M.tolist() == pytest.approx([-2.0 * 1.0 / 2, 0.0])
    assert loss.total.item() == pytest.approx(-1.0)
    assert float(loss.distill) == pytest.approx(-0.5)


def test_a_teacher_without_weight_is_ignored() -> None:
    micro = taught([[7, 4], [3, 4]], [[-0.5, -3.0]] * 2)

    loss, gradient_M = loss_of(micro, LossRule(gkd_mode="policy_gradient"))

    assert float(loss.distill) == 0.0
    assert not gradient_M.any()


def test_groups_with_and_without_a_teacher_share_a_batch() -> None:
    with_teacher = a_group(
        "a",
        distill_token_ids=np.full((9, 3), 5, dtype=np.int32),
        distill_logprobs=np.full((9, 3), -1.0, dtype=np.float32),
    )

    micro = one(with_teacher, a_group("b"))

    assert micro.distill_token_ids_MK is not None
    assert micro.distill_logprobs_MK is not None
    assert micro.distill_token_ids_MK.shape == (10, 3)
    assert micro.distill_logprobs_MK[:, 0].tolist() == [-1.0] * 5 + [PADDING_LOGPROB] * 5


# What may be left out


@pytest.mark.parametrize(
    ("rule", "skips"),
    [
        (LossRule(), True),
        (LossRule(beta=0.1), False),
        (LossRule(entropy_coef=0.1), False),
        (LossRule(distill_coef=0.1), False),
    ],
)
def test_sequences_without_a_policy_gradient_are_left_out_only_where_no_other_term_needs_them(
    rule: LossRule, skips: bool
) -> None:
    group = a_group(
        "a",
        distill_token_ids=np.full((9, 1), 5, dtype=np.int32),
        distill_logprobs=np.full((9, 1), -1.0, dtype=np.float32),
    )
    batch = build_step_batch(0, [group], advantage_scale="none", overlong="keep", temperature=1.0)

    assert rule.skips_zero_advantages(batch) is skips
