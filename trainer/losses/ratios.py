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
    logprobs_M: Tensor, reference_logprobs_M: Tensor, sequence_M: Tensor, *, is_geometric_mean: bool
) -> Tensor:
    """Each token's [M] ratio of its whole sequence.

    Args:
        sequence_M: [M] which sequence of the micro batch each token is in, counted from 0.
        is_geometric_mean: exp of the mean log-ratio, which does not grow with the length; else exp of their sum.
    """
    log_ratio_M = logprobs_M - reference_logprobs_M
    if not len(log_ratio_M):
        return log_ratio_M
    count = int(sequence_M.max()) + 1
    total_S = log_ratio_M.new_zeros(count).index_add(0, sequence_M, log_ratio_M)
    if is_geometric_mean:
        total_S = total_S / torch.bincount(sequence_M, minlength=count).clamp(min=1)
    return torch.exp(total_S.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))[sequence_M]
