"""KL estimators: golden values, and what their gradients are in expectation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.losses.divergence import KlEstimator, kl_estimate

LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1, -0.4, 1.5], dtype=torch.float64)
REFERENCE = torch.tensor([0.9, 0.2, -0.5, 0.4, -1.0, 0.6], dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize(
    ("estimator", "d", "expected"),
    [
        ("k1", 0.1, 0.1), ("k2", 0.1, 0.005), ("k3", 0.1, 0.004837),
        ("k1", -0.5, -0.5), ("k2", -0.5, 0.125), ("k3", -0.5, 0.148721),
    ],
)  # fmt: skip
def test_golden_values(estimator: KlEstimator, d: float, expected: float) -> None:
    found = kl_estimate(torch.tensor([-1.0 + d]), torch.tensor([-1.0]), estimator)

    assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_an_unbiased_estimator_has_the_kl_as_its_mean(estimator: KlEstimator) -> None:
    logprobs_V = LOGITS.log_softmax(-1)

    mean = (logprobs_V.exp() * kl_estimate(logprobs_V, REFERENCE, estimator)).sum()

    torch.testing.assert_close(mean, kl(logprobs_V, REFERENCE))


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k2", lambda logprobs_V: kl(logprobs_V, REFERENCE)),
        ("k3", lambda logprobs_V: kl(REFERENCE, logprobs_V)),
        ("k1", lambda logprobs_V: logprobs_V.sum() * 0.0),
    ],
)
def test_the_gradient_in_the_loss_is_that_of(estimator: KlEstimator, expected: object) -> None:
    found = gradient(
        lambda logprobs_V: (logprobs_V.exp().detach() * kl_estimate(logprobs_V, REFERENCE, estimator)).sum()
    )

    torch.testing.assert_close(found, gradient(expected))


def kl(p_V: Tensor, q_V: Tensor) -> Tensor:
    return (p_V.exp() * (p_V - q_V)).sum()


def gradient(value: object) -> Tensor:
    leaf_V = LOGITS.clone().requires_grad_()
    value(leaf_V.log_softmax(-1)).backward()  # type: ignore[operator]
    assert leaf_V.grad is not None
    return leaf_V.grad
