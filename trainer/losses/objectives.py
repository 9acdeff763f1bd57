"""What each token contributes: the policy-gradient objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.losses.ratios import sequence_ratio, token_ratio

LossType = Literal["ppo_clip", "reinforce", "cispo", "gspo", "dppo"]
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)


@dataclass(frozen=True)
class Objective:
    """Which objective, and its bounds."""

    loss_type: LossType = "ppo_clip"
    epsilon_low: float = 0.2
    """ppo_clip, gspo: how far the ratio may fall below 1."""
    epsilon_high: float = 0.28
    """ppo_clip, gspo: how far it may rise above 1."""
    dual_clip_c: float | None = None
    """ppo_clip: for A < 0 the objective is at least c A, so that one unlikely token cannot dominate."""
    cispo_cap: float = 5.0
    """cispo: largest weight of a token."""
    dppo_low: float = 0.2
    """dppo: a token with A <= 0 is left out once its probability has fallen by more than this."""
    dppo_high: float = 0.2
    """dppo: a token with A > 0 is left out once its probability has risen by more than this."""


@dataclass(frozen=True)
class TokenLosses:
    """Of each trained token."""

    losses_M: Tensor
    """[M] to be minimised."""
    ratio_M: Tensor
    """[M] probability now over before, without gradient; gspo: of the whole sequence."""
    clipped_low_M: Tensor
    """[M] bool: the lower bound took the gradient away."""
    clipped_high_M: Tensor
    """[M] bool: the upper bound took the gradient away, or (cispo) capped the weight."""


def token_losses(
    logprobs_M: Tensor,
    proximal_logprobs_M: Tensor,
    advantages_M: Tensor,
    weights_M: Tensor,
    sequence_M: Tensor,
    objective: Objective,
    *,
    is_sampled_M: Tensor | None = None,
) -> TokenLosses:
    """Loss of each token.

    With r = exp(lp - lp_before) and w the off-policy weight:
    ppo_clip: -w min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A).
    reinforce: -w A exp(lp - stopgrad(lp)), which is -w A in value and has the policy gradient.
    cispo: -w stopgrad(min(r, cispo_cap)) A lp: a token over the cap keeps its gradient.
    gspo: ppo_clip with one ratio for the whole sequence, the geometric mean of its tokens'.
    dppo: -w A r, without the tokens whose probability has moved further than the bounds in the direction of A.

    Args:
        logprobs_M: [M] under the weights being trained; carries the gradient.
        proximal_logprobs_M: [M] under the weights that the bounds are measured from: those at the start of the step or, with
            correction=bypass, the engine's.
        advantages_M: [M] advantage of each token.
        weights_M: [M] off-policy correction, constant.
        sequence_M: [M] which sequence of the micro batch each token is in.
        is_sampled_M: [M] bool: the tokens that gspo's ratio of a sequence is made of; all if absent.
    Source: Schulman et al. 2017, arXiv:1707.06347; Ye et al. 2020, arXiv:1912.09729 (dual clip); Yu et al. 2025,
        arXiv:2503.14476 (epsilon_high above epsilon_low); MiniMax 2025, arXiv:2506.13585 (cispo); Zheng et al. 2025,
        arXiv:2507.18071 (gspo); the default loss of prime-rl (dppo).
    """
    before_M = proximal_logprobs_M.detach()
    match objective.loss_type:
        case "reinforce":
            losses_M = -weights_M * advantages_M * torch.exp(logprobs_M - logprobs_M.detach())
            never_M = torch.zeros_like(advantages_M, dtype=torch.bool)
            return TokenLosses(losses_M, token_ratio(logprobs_M.detach(), before_M), never_M, never_M)
        case "cispo":
            return _cispo(logprobs_M, before_M, advantages_M, weights_M, objective)
        case "dppo":
            return _dppo(logprobs_M, before_M, advantages_M, weights_M, objective)
        case "gspo":
            ratio_M = _gspo_ratio(logprobs_M, before_M, sequence_M, is_sampled_M)
        case "ppo_clip":
            ratio_M = token_ratio(logprobs_M, before_M)
    return _clipped(ratio_M, advantages_M, weights_M, objective)


def _clipped(ratio_M: Tensor, advantages_M: Tensor, weights_M: Tensor, objective: Objective) -> TokenLosses:
    low, high = 1.0 - objective.epsilon_low, 1.0 + objective.epsilon_high
    objective_M = torch.minimum(ratio_M * advantages_M, ratio_M.clamp(low, high) * advantages_M)
    if objective.dual_clip_c is not None:
        floor_M = torch.maximum(objective_M, objective.dual_clip_c * advantages_M)
        objective_M = torch.where(advantages_M < 0, floor_M, objective_M)
    now_M = ratio_M.detach()
    return TokenLosses(
        -weights_M * objective_M, now_M, (now_M < low) & (advantages_M < 0), (now_M > high) & (advantages_M > 0)
    )


def _gspo_ratio(logprobs_M: Tensor, before_M: Tensor, sequence_M: Tensor, is_sampled_M: Tensor | None) -> Tensor:
    """The sequence's ratio in value; through each token flows the gradient of its own logprob, as GSPO-token has it."""
    ratio_M = sequence_ratio(
        logprobs_M.detach(), before_M, sequence_M, is_geometric_mean=True, is_sampled_M=is_sampled_M
    )
    return ratio_M * torch.exp(logprobs_M - logprobs_M.detach())


def _cispo(
    logprobs_M: Tensor, before_M: Tensor, advantages_M: Tensor, weights_M: Tensor, objective: Objective
) -> TokenLosses:
    ratio_M = token_ratio(logprobs_M.detach(), before_M)
    losses_M = -weights_M * ratio_M.clamp(max=objective.cispo_cap) * advantages_M * logprobs_M
    return TokenLosses(losses_M, ratio_M, torch.zeros_like(ratio_M, dtype=torch.bool), ratio_M > objective.cispo_cap)


def _dppo(
    logprobs_M: Tensor, before_M: Tensor, advantages_M: Tensor, weights_M: Tensor, objective: Objective
) -> TokenLosses:
    ratio_M = token_ratio(logprobs_M, before_M)
    moved_M = logprobs_M.detach().exp() - before_M.exp()
    rose_M = (advantages_M > 0) & (moved_M > objective.dppo_high)
    fell_M = (advantages_M <= 0) & (moved_M < -objective.dppo_low)
    losses_M = torch.where(rose_M | fell_M, 0.0, -weights_M * advantages_M * ratio_M)
    return TokenLosses(losses_M, ratio_M.detach(), fell_M, rose_M)
