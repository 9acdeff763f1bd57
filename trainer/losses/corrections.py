"""Weights that turn the tokens which the engine sampled into tokens of the policy before this step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.losses.ratios import sequence_ratio, token_ratio

Correction = Literal["tis", "mis", "seq_tis", "seq_mis", "bypass", "none"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)


@dataclass(frozen=True)
class CorrectionRule:
    """Which correction, and its bounds. Ratios are exp(lp_before - lp_engine)."""

    correction: Correction = "tis"
    is_cap: float = 2.0
    """tis, seq_tis: largest weight."""
    mis_low: float = 0.5
    """mis, seq_mis: a ratio below this gets the weight 0."""
    mis_high: float = 5.0
    """mis, seq_mis: a ratio above this gets the weight 0."""

    @property
    def measures_from_engine(self) -> bool:
        """Whether the objective's ratio is taken against the engine's logprobs, and no weight corrects it."""
        return self.correction == "bypass"


def correction_weights(
    proximal_logprobs_M: Tensor,
    inference_logprobs_M: Tensor,
    sequence_M: Tensor,
    rule: CorrectionRule,
    *,
    is_sampled_M: Tensor | None = None,
) -> Tensor:
    """[M] weight of each token; no gradient flows through it.

    tis: min(ratio, is_cap) of the token. seq_tis: of the product over its sequence. mis: the token's ratio within
    [mis_low, mis_high], else 0 (IcePop). seq_mis: the same of the geometric mean over its sequence, so that the length does
    not decide. bypass, none: 1.

    Args:
        proximal_logprobs_M: [M] under the weights at the start of the step.
        inference_logprobs_M: [M] as the engine sampled them.
        sequence_M: [M] which sequence of the micro batch each token is in.
        is_sampled_M: [M] bool: the tokens that a sequence's ratio is made of; all if absent.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (tis); Liu et al. 2025,
        "When speed kills stability" (sequence variants); Ling team 2025, arXiv:2510.18855 (IcePop).
    """
    before_M = proximal_logprobs_M.detach()
    match rule.correction:
        case "tis":
            return token_ratio(before_M, inference_logprobs_M).clamp(max=rule.is_cap)
        case "seq_tis":
            ratio_M = sequence_ratio(
                before_M, inference_logprobs_M, sequence_M, is_geometric_mean=False, is_sampled_M=is_sampled_M
            )
            return ratio_M.clamp(max=rule.is_cap)
        case "mis":
            return _masked(token_ratio(before_M, inference_logprobs_M), rule)
        case "seq_mis":
            ratio_M = sequence_ratio(
                before_M, inference_logprobs_M, sequence_M, is_geometric_mean=True, is_sampled_M=is_sampled_M
            )
            return _masked(ratio_M, rule)
        case "bypass" | "none":
            return torch.ones_like(before_M)


def _masked(ratio_M: Tensor, rule: CorrectionRule) -> Tensor:
    is_inside = (ratio_M >= rule.mis_low) & (ratio_M <= rule.mis_high)
    return torch.where(is_inside, ratio_M, 0.0)
