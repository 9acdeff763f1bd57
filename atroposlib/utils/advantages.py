"""Advantages over the steps of trajectories of different lengths, in numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from atroposlib.type_definitions import number

# N: trajectories, S: steps of one of them


def allclose_to_first(
    values: npt.ArrayLike,
    rtol: float = 1e-05,
    atol: float = 1e-08,
    equal_nan: bool = False,
    return_vector: bool = False,
) -> npt.NDArray[np.bool_] | bool:
    """Whether every entry is close to the first one.

    Args:
        values: [N, ...] entries along the first axis.
        return_vector: answer [N], one for each entry, instead of one for all.
    """
    entries = np.asarray(values)
    if len(entries) == 0:
        return np.zeros(0, dtype=bool) if return_vector else True
    is_close = np.isclose(entries, entries[0], rtol=rtol, atol=atol, equal_nan=equal_nan)
    by_entry: npt.NDArray[np.bool_] = np.asarray(is_close.reshape(len(entries), -1).all(axis=1))
    return by_entry if return_vector else bool(by_entry.all())


def compute_stats(data: Sequence[Any]) -> dict[str, float]:
    """Mean and population variance of all numbers in a list, however nested and jagged.

    Returns:
        {"mean", "var"}.
    Raises:
        ValueError: there is no number in it.
    """
    flat = np.fromiter(_numbers(data), dtype=np.float64)
    if flat.size == 0:
        raise ValueError("compute_stats needs at least one number, got none")
    return {"mean": float(flat.mean()), "var": float(flat.var())}


def compute_discounted_returns(rewards: npt.ArrayLike, gamma: float) -> npt.NDArray[np.float64]:
    """[S] sum over later steps, each further one weighted by another gamma: G_s = r_s + gamma * G_(s+1)."""
    rewards_S = np.asarray(rewards, dtype=np.float64)
    returns_S = np.zeros_like(rewards_S)
    future = 0.0
    for step in range(len(rewards_S) - 1, -1, -1):
        future = rewards_S[step] + gamma * future
        returns_S[step] = future
    return returns_S


def compute_grpo_process_supervision_advantages(
    rewards: Sequence[Sequence[number]], gamma: float | None = None, std_tol: float = 1e-8
) -> list[npt.NDArray[np.float64]]:
    """Advantage of every step: the rewards of this step and later ones, normalised over all steps of the group.

    Args:
        rewards: [N][S] reward of each step of each trajectory.
        gamma: discount of later steps; None for none.
        std_tol: a standard deviation below this counts as zero.
    Returns:
        [N] arrays of [S].
    Raises:
        ValueError: there are no rewards, or they are all equal and so say nothing.
    Source: Shao et al. 2024, arXiv:2402.03300, process supervision.
    """
    stats = compute_stats(rewards)
    std = float(np.sqrt(stats["var"]))
    if std < std_tol:
        raise ValueError(
            f"the rewards of all steps are equal up to a standard deviation of {std:.3g} (std_tol={std_tol:g}); "
            "leave such a group out, it teaches nothing"
        )
    normalised = [(np.asarray(row, dtype=np.float64) - stats["mean"]) / std for row in rewards]
    return [compute_discounted_returns(row, 1.0 if gamma is None else gamma) for row in normalised]


def _numbers(data: Any) -> Iterator[float]:
    if isinstance(data, (Sequence, np.ndarray)):
        for part in data:
            yield from _numbers(part)
    else:
        yield float(data)
