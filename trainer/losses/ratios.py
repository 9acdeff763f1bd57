"""Ratios of probabilities, of tokens and of whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before exp: e^20 is past any cap, and finite."""


def token_ratio(logprobs_M: Tensor, reference_logprobs_M: Tensor) -> Tensor:
    """exp of the difference of logprobs, [M], with the difference clamped to +-LOG_RATIO_LIMIT."""
    return torch.exp((logprobs_M - reference_logprobs_M).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def sequence_ratio(
    logprobs_M: Tensor,
    reference_logprobs_M: Tensor,
    sequence_M: Tensor,
    *,
    is_geometric_mean: bool,
    is_sampled_M: Tensor | None = None,
) -> Tensor:
    """Each token's [M] ratio of its whole sequence.

    Args:
        sequence_M: [M] which sequence of the micro batch each token is in, counted from 0.
        is_geometric_mean: exp of the mean log-ratio, which does not grow with the length; else exp of their sum.
        is_sampled_M: [M] bool: the tokens that the policy chose, whose ratio it is; all if absent. A token that is learnt as
            it is says nothing about how far the policy has moved.
    """
    log_ratio_M = logprobs_M - reference_logprobs_M
    if not len(log_ratio_M):
        return log_ratio_M
    counted_M = torch.ones_like(sequence_M) if is_sampled_M is None else is_sampled_M.to(sequence_M.dtype)
    count = int(sequence_M.max()) + 1
    total_S = log_ratio_M.new_zeros(count).index_add(0, sequence_M, torch.where(counted_M > 0, log_ratio_M, 0.0))
    if is_geometric_mean:
        total_S = total_S / counted_M.new_zeros(count).index_add(0, sequence_M, counted_M).clamp(min=1)
    return torch.exp(total_S.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))[sequence_M]
