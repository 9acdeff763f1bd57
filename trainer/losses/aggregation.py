"""What one token counts in the loss of the whole batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

LossAggregation = Literal["token_mean", "sequence_mean", "constant", "prompt_mean"]
LOSS_AGGREGATIONS: tuple[LossAggregation, ...] = get_args(LossAggregation)


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
