"""Figures of a step: what trainer and engine disagree about, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.metrics import TokenSums


def figures(delta: list[float], *, has: list[bool] | None = None, loss_weights: list[float] | None = None) -> Any:
    """Of tokens whose trainer logprob exceeds the engine's by `delta` nats."""
    delta_M = torch.tensor(delta)
    sums = TokenSums(torch.device("cpu"))
    sums.add(
        loss=torch.tensor(0.5),
        logprobs_M=delta_M - 1.0,
        inference_logprobs_M=torch.full_like(delta_M, -1.0),
        has_inference_logprobs_M=torch.tensor(has or [True] * len(delta)),
        entropies_M=torch.ones_like(delta_M),
        weights_M=delta_M.exp().clamp(max=2.0),
        loss_weights_M=torch.tensor(loss_weights or [0.25] * len(delta)),
        is_cap=2.0,
    )
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
    metrics = figures([0.1, 5.0, 5.0], has=[True, False, True], loss_weights=[0.5, 0.5, 0.0])

    assert metrics["mismatch/difference_nats"] == pytest.approx(0.1)
    assert metrics["mismatch/ratio_outside_frac"] == 0.0
    assert figures([5.0], has=[False])["mismatch/ratio_max"] == 0.0
