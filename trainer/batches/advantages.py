"""Advantages: each trajectory's reward relative to its group.

Shapes: N trajectories in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from atroposlib.wire.layout import Float64

AdvantageScale = Literal["none", "group_std", "batch_std", "loo"]
ADVANTAGE_SCALES: tuple[AdvantageScale, ...] = get_args(AdvantageScale)

GROUP_STD_EPSILON = 1e-4
BATCH_STD_EPSILON = 1e-6


def group_advantages(rewards_N: Float64, *, scale: AdvantageScale = "none") -> Float64:
    """Score each trajectory against the others of its group (GRPO).

    Args:
        rewards_N: [N] rewards of one group.
        scale: none: r - mean. group_std: (r - mean) / (std + 1e-4), std with Bessel's correction.
            loo: r - mean of the other N - 1. batch_std needs the whole batch: see batch_advantages.
    Returns:
        [N] advantages, which sum to zero up to rounding.
    Raises:
        ValueError: N is 1, so there is nothing to compare with.
    Source: Shao et al. 2024, arXiv:2402.03300 (group_std); Liu et al. 2025, arXiv:2503.20783 (none);
        Ahmadian et al. 2024, arXiv:2402.14740 (loo).
    """
    count = len(rewards_N)
    if count < 2:
        raise ValueError("advantages need at least 2 trajectories in a group; raise group_size")
    centred_N: Float64 = rewards_N - rewards_N.mean()
    if scale == "group_std":
        centred_N /= rewards_N.std(ddof=1) + GROUP_STD_EPSILON
    if scale == "loo":
        centred_N *= count / (count - 1)
    return centred_N


def batch_advantages(rewards: Sequence[Float64], *, scale: AdvantageScale = "none") -> list[Float64]:
    """Advantages of every group of a batch.

    A group of one trajectory (the others failed) has nothing to compare with and gets 0: it is no signal.

    Args:
        rewards: for each group, its [N] rewards.
        scale: as group_advantages, or batch_std: (r - mean of the group) / (std of all of these + 1e-6).
    Returns:
        For each group, its [N] advantages.
    """
    by_group = [
        group_advantages(rewards_N, scale=scale) if len(rewards_N) > 1 else np.zeros(len(rewards_N))
        for rewards_N in rewards
    ]
    if scale == "batch_std" and by_group:
        std = np.concatenate(by_group).std() + BATCH_STD_EPSILON
        return [advantages_N / std for advantages_N in by_group]
    return by_group
