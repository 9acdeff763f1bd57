"""How far the policy is from a reference: estimates from the sampled token alone."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.losses.ratios import LOG_RATIO_LIMIT

KlEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: tuple[KlEstimator, ...] = get_args(KlEstimator)
KlPlacement = Literal["loss", "reward"]
KL_PLACEMENTS: tuple[KlPlacement, ...] = get_args(KlPlacement)


def kl_estimate(logprobs_M: Tensor, ref_logprobs_M: Tensor, estimator: KlEstimator) -> Tensor:
    """[M] estimate of KL(policy || reference) at each token, nats.

    With d = lp - lp_ref: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d. Placed in the loss, the expected gradient of k2 is that of
    KL(policy || reference), of k3 that of KL(reference || policy), and of k1 it is zero: k1 belongs into the reward.

    Source: Schulman 2020, "Approximating KL divergence"; Liu et al. 2025, arXiv:2510.01555 (the gradients).
    """
    d_M = (logprobs_M - ref_logprobs_M).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    match estimator:
        case "k1":
            return d_M
        case "k2":
            return d_M.square() / 2
        case "k3":
            return torch.expm1(-d_M) + d_M
