"""Divergence from a teacher that names its K likeliest tokens at each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Probability that a tail is taken to have at least, so that its logarithm exists."""


def topk_jsd(student_logprobs_MK: Tensor, teacher_logprobs_MK: Tensor, is_there_MK: Tensor, *, beta: float) -> Tensor:
    """[M] generalised Jensen-Shannon divergence over the teacher's candidates and one bucket for all other tokens, nats.

    M = beta T + (1 - beta) S; D = beta KL(T || M) + (1 - beta) KL(S || M). beta = 0 is KL(T || S) (covers the teacher's modes),
    beta = 1 is KL(S || T) (seeks one of them): the limits themselves, not D there, which would be 0.

    Args:
        student_logprobs_MK: [M, K] of the candidates under the policy; carries the gradient.
        teacher_logprobs_MK: [M, K] of the same candidates, constant.
        is_there_MK: [M, K] False where a position has fewer candidates.
    Raises:
        ValueError: beta is not within 0 and 1.
    Source: Agarwal et al. 2024, arXiv:2306.13649.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta mixes teacher and student, so it is from 0 to 1, not {beta}")
    student_MB = _with_tail(student_logprobs_MK, is_there_MK)
    teacher_MB = _with_tail(teacher_logprobs_MK.detach(), is_there_MK)
    if beta == 0.0:
        return _kl(teacher_MB, student_MB)
    if beta == 1.0:
        return _kl(student_MB, teacher_MB)
    mixed_MB = torch.logaddexp(teacher_MB + math.log(beta), student_MB + math.log(1.0 - beta))
    return beta * _kl(teacher_MB, mixed_MB) + (1.0 - beta) * _kl(student_MB, mixed_MB)


def _with_tail(logprobs_MK: Tensor, is_there_MK: Tensor) -> Tensor:
    """[M, K + 1] the candidates and, last, all the probability that they leave."""
    absent = math.log(SMALLEST)
    candidates_MK = torch.where(is_there_MK, logprobs_MK.clamp(max=0.0), absent)
    covered_M = torch.where(is_there_MK, candidates_MK.exp(), 0.0).sum(-1)
    tail_M = torch.log((1.0 - covered_M).clamp(min=SMALLEST))
    return torch.cat([candidates_MK, tail_M[:, None]], dim=-1)


def _kl(p_MB: Tensor, q_MB: Tensor) -> Tensor:
    return (p_MB.exp() * (p_MB - q_MB)).sum(-1)
