"""Figures of a step: what trainer and engine disagree about, token by token, and what the loss was made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.fakes import a_group
from trainer.batches.micro_batch import MicroBatch, idle_micro_batch
from trainer.batches.step_batch import build_step_batch
from trainer.losses.corrections import CorrectionRule
from trainer.losses.objectives import Objective
from trainer.reporting.metrics import TokenSums, batch_metrics
from trainer.step.loss import LossRule, micro_loss


def a_micro_batch(tokens: int, **columns: Any) -> MicroBatch:
    """Tokens of one sequence that the engine gave -1 nats."""
    per_token: dict[str, Any] = {
        "target_ids_M": torch.zeros(tokens, dtype=torch.int64),
        "advantages_M": torch.ones(tokens),
        "loss_weights_M": torch.full((tokens,), 1 / tokens),
        "inference_logprobs_M": torch.full((tokens,), -1.0),
        "has_inference_logprobs_M": torch.ones(tokens, dtype=torch.bool),
        "sequence_M": torch.zeros(tokens, dtype=torch.int64),
        "is_supervised_M": torch.zeros(tokens, dtype=torch.bool),
    }
    return replace(idle_micro_batch(), **{**per_token, **columns})


def figures(delta: list[float], rule: LossRule | None = None, **columns: Any) -> dict[str, float]:
    """Of tokens whose trainer logprob exceeds the engine's by `delta` nats."""
    micro = a_micro_batch(len(delta), **columns)
    loss = micro_loss(micro, torch.tensor(delta) - 1.0, torch.ones(len(delta)), None, rule or LossRule())
    sums = TokenSums(torch.device("cpu"))
    sums.add(micro, loss, torch.ones(len(delta)))
    return sums.gathered().as_metrics()


def test_equal_logprobs_are_no_mismatch() -> None:
    metrics = figures([0.0, 0.0])

    assert {name: value for name, value in metrics.items() if name.startswith("mismatch/")} == {
        "mismatch/kl_k1": 0.0,
        "mismatch/kl_k3": 0.0,
        "mismatch/difference_nats": 0.0,
        "mismatch/ratio_mean": 1.0,
        "mismatch/ratio_max": 1.0,
        "mismatch/ratio_outside_frac": 0.0,
    }


def test_mismatch_is_measured_over_tokens() -> None:
    log2 = 0.6931471805599453
    metrics = figures([2 * log2, -2 * log2, -log2 / 2, 0.0])  # ratios 4, 1/4, 0.71, 1

    assert metrics["mismatch/kl_k1"] == pytest.approx(log2 / 8)
    assert metrics["mismatch/kl_k3"] == pytest.approx((4 + 0.25 + 2**-0.5 + 1) / 4 - 1 + log2 / 8)
    assert metrics["mismatch/difference_nats"] == pytest.approx(4.5 * log2 / 4)
    assert metrics["mismatch/ratio_mean"] == pytest.approx((4 + 0.25 + 2**-0.5 + 1) / 4)
    assert metrics["mismatch/ratio_max"] == pytest.approx(4.0)
    assert metrics["mismatch/ratio_outside_frac"] == 0.5
    assert metrics["is/truncated_frac"] == 0.25


def test_tokens_without_the_engines_logprob_or_without_weight_do_not_count() -> None:
    has, weights = torch.tensor([True, False, True]), torch.tensor([0.5, 0.5, 0.0])
    metrics = figures([0.1, 5.0, 5.0], has_inference_logprobs_M=has, loss_weights_M=weights)

    assert metrics["mismatch/difference_nats"] == pytest.approx(0.1)
    assert metrics["mismatch/ratio_outside_frac"] == 0.0
    assert figures([5.0], has_inference_logprobs_M=torch.tensor([False]))["mismatch/ratio_max"] == 0.0


def test_supervised_tokens_are_no_mismatch_and_are_not_clipped() -> None:
    supervised = torch.tensor([True, False])

    metrics = figures([3.0, 0.0], LossRule(correction=CorrectionRule("bypass")), is_supervised_M=supervised)

    assert metrics["mismatch/ratio_max"] == 1.0
    assert (metrics["ratio/mean"], metrics["ratio/clip_frac_high"]) == (1.0, 0.0)
    assert metrics["loss/sft"] == pytest.approx(-2.0 / 2)


def test_clipped_tokens_are_counted_by_the_bound_that_clipped_them() -> None:
    proximal, advantages = torch.full((4,), -1.0), torch.tensor([1.0, -1.0, -1.0, 1.0])

    metrics = figures([0.5, 0.5, -0.5, 0.0], proximal_logprobs_M=proximal, advantages_M=advantages)

    assert metrics["ratio/clip_frac_high"] == 0.25
    assert metrics["ratio/clip_frac_low"] == 0.25
    assert metrics["ratio/mean"] == pytest.approx((2 * np.exp(0.5) + np.exp(-0.5) + 1) / 4)


def test_the_parts_of_the_loss_add_up() -> None:
    rule = LossRule(Objective("reinforce"), CorrectionRule("none"), beta=0.5, entropy_coef=0.1)
    ref = torch.full((2,), -1.2)

    metrics = figures([0.0, 0.0], rule, ref_logprobs_M=ref)

    assert metrics["loss/pg"] == pytest.approx(-1.0)
    assert metrics["loss/kl"] == pytest.approx(0.02)
    assert metrics["loss/total"] == pytest.approx(-1.0 + 0.5 * 0.02 - 0.1 * 1.0)


def test_losses_of_several_optimizer_steps_are_averaged() -> None:
    micro, sums = a_micro_batch(2), TokenSums(torch.device("cpu"))
    for logprobs in (torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0])):
        sums.add(micro, micro_loss(micro, logprobs, torch.ones(2), None, LossRule()), torch.ones(2))

    metrics = sums.gathered(optimizer_steps=2).as_metrics()

    assert metrics["loss/total"] == pytest.approx(-1.0)
    assert metrics["entropy"] == 1.0


def test_rewards_are_described_over_the_batch_and_the_groups() -> None:
    groups = [a_group("a", rewards=[3.0, -1.0]), a_group("b", rewards=[1.0, 1.0])]
    batch = build_step_batch(0, groups, advantage_scale="none", overlong="keep", temperature=1.0)

    metrics = batch_metrics(batch)

    assert [metrics[f"reward/{name}"] for name in ("mean", "min", "max")] == [1.0, -1.0, 3.0]
    assert metrics["reward/std"] == pytest.approx(2**0.5)
    assert metrics["frac_reward_zero_std"] == 0.5
