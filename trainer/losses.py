"""The policy loss: per-token objectives, off-policy correction, and how tokens are averaged. Pure functions.

Shapes: M trained tokens, N sequences of the batch. All logprobs are in nats and at the sampling temperature.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LossType = Literal["ppo_clip", "reinforce"]
LossAggregation = Literal["token_mean", "sequence_mean", "constant", "prompt_mean"]
Correction = Literal["tis", "none"]
LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
LOSS_AGGREGATIONS: tuple[LossAggregation, ...] = get_args(LossAggregation)

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before exp: e^20 is past any cap, and finite."""


def token_ratio(logprobs_M: Tensor, reference_logprobs_M: Tensor) -> Tensor:
    """exp of the difference of logprobs, [M], with the difference clamped to +-LOG_RATIO_LIMIT."""
    return torch.exp((logprobs_M - reference_logprobs_M).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def truncated_importance_weights(proximal_logprobs_M: Tensor, inference_logprobs_M: Tensor, *, cap: float) -> Tensor:
    """Weights that turn the tokens the engine sampled into tokens of the policy before this step.

    Args:
        proximal_logprobs_M: [M] under the weights at the start of the step; no gradient flows through the weights.
        inference_logprobs_M: [M] as the engine sampled them.
        cap: the largest weight.
    Returns:
        [M] min(ratio, cap).
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (TIS).
    """
    return token_ratio(proximal_logprobs_M.detach(), inference_logprobs_M).clamp(max=cap)


def token_losses(
    logprobs_M: Tensor,
    proximal_logprobs_M: Tensor,
    advantages_M: Tensor,
    weights_M: Tensor,
    *,
    loss_type: LossType = "ppo_clip",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    dual_clip_c: float | None = None,
) -> Tensor:
    """Loss of each token, to be minimised.

    Args:
        logprobs_M: [M] under the weights being trained; carries the gradient.
        proximal_logprobs_M: [M] under the weights at the start of the step.
        advantages_M: [M] advantage of each token.
        weights_M: [M] off-policy correction, constant.
        loss_type: ppo_clip: -w min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A).
            reinforce: -w A exp(lp - stopgrad(lp)), which is -w A in value and has the policy gradient.
        dual_clip_c: for A < 0 the objective is at least c A, so that one unlikely token cannot dominate.
    Returns:
        [M] losses.
    Source: Schulman et al. 2017, arXiv:1707.06347; Ye et al. 2020, arXiv:1912.09729 (dual clip);
        Yu et al. 2025, arXiv:2503.14476 (epsilon_high above epsilon_low).
    """
    if loss_type == "reinforce":
        return -weights_M * advantages_M * torch.exp(logprobs_M - logprobs_M.detach())
    ratio_M = token_ratio(logprobs_M, proximal_logprobs_M.detach())
    clipped_M = ratio_M.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
    objective_M = torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)
    if dual_clip_c is not None:
        floor_M = torch.maximum(objective_M, dual_clip_c * advantages_M)
        objective_M = torch.where(advantages_M < 0, floor_M, objective_M)
    return -weights_M * objective_M


def loss_weights(
    trained_tokens_N: Tensor,
    group_index_N: Tensor,
    *,
    aggregation: LossAggregation = "token_mean",
    max_completion_length: int | None = None,
) -> Tensor:
    """What one token of each sequence counts in the loss of the whole batch.

    The loss is then a plain sum over tokens of weight times loss, so it does not depend on how the batch is cut into
    micro batches and ranks.

    Args:
        trained_tokens_N: [N] tokens of each sequence that are trained; 0 where a sequence is masked out.
        group_index_N: [N] which group each sequence belongs to.
        aggregation: token_mean: 1 / all trained tokens. sequence_mean: mean over sequences of their token mean.
            constant: 1 / (N * max_completion_length). prompt_mean: mean over groups of their token mean.
        max_completion_length: tokens, for constant.
    Returns:
        [N] float64 weights. With masked sequences, sequence_mean, constant and prompt_mean still divide by all of
        them (a masked sequence has loss zero), token_mean by the tokens that are left.
    Raises:
        ValueError: constant without max_completion_length.
    Source: Liu et al. 2025, arXiv:2503.20783 (constant); Yu et al. 2025, arXiv:2503.14476 (token_mean).
    """
    tokens_N = trained_tokens_N.to(torch.float64)
    if aggregation == "token_mean":
        return torch.full_like(tokens_N, 1.0) / tokens_N.sum().clamp(min=1.0)
    if aggregation == "sequence_mean":
        return 1.0 / (len(tokens_N) * tokens_N.clamp(min=1.0))
    if aggregation == "constant":
        if max_completion_length is None:
            raise ValueError("aggregation 'constant' needs max_completion_length")
        return torch.full_like(tokens_N, 1.0 / (len(tokens_N) * max_completion_length))
    groups = int(group_index_N.max()) + 1
    group_tokens = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_index_N, tokens_N)
    return 1.0 / (groups * group_tokens[group_index_N].clamp(min=1.0))
