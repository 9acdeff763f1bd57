"""Divergence from a teacher: over the whole vocabulary, over its K likeliest tokens, or over spans of text.

Shapes beside those of the package: V vocabulary, B outcomes of a distribution, C a batch of distributions, S spans.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Probability that a tail is taken to have at least, so that its logarithm exists."""


def generalised_jsd(student_logprobs_CB: Tensor, teacher_logprobs_CB: Tensor, *, beta: float) -> Tensor:
    """[C] generalised Jensen-Shannon divergence of two distributions, nats.

    M = beta T + (1 - beta) S; D = beta KL(T || M) + (1 - beta) KL(S || M). beta = 0 is KL(T || S) (covers the teacher's modes),
    beta = 1 is KL(S || T) (seeks one of them): the limits of D / beta and D / (1 - beta), not D there, which would be 0.

    Args:
        student_logprobs_CB: [C, B] over all outcomes; carries the gradient.
        teacher_logprobs_CB: [C, B] of the same outcomes.
    Raises:
        ValueError: beta is not within 0 and 1.
    Source: Agarwal et al. 2024, arXiv:2306.13649.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta mixes teacher and student, so it is from 0 to 1, not {beta}")
    if beta == 0.0:
        return kl_divergence(teacher_logprobs_CB, student_logprobs_CB)
    if beta == 1.0:
        return kl_divergence(student_logprobs_CB, teacher_logprobs_CB)
    mixed_CB = torch.logaddexp(teacher_logprobs_CB + math.log(beta), student_logprobs_CB + math.log(1.0 - beta))
    from_teacher_C = kl_divergence(teacher_logprobs_CB, mixed_CB)
    return beta * from_teacher_C + (1.0 - beta) * kl_divergence(student_logprobs_CB, mixed_CB)


def kl_divergence(p_logprobs_CB: Tensor, q_logprobs_CB: Tensor) -> Tensor:
    """[C] KL(p || q) over all outcomes, nats."""
    return (p_logprobs_CB.exp() * (p_logprobs_CB - q_logprobs_CB)).sum(-1)


def jsd_scale(beta: float) -> float:
    """What makes the divergence as large near beta 0 and 1 as it is at 0.5: 1 / (4 beta (1 - beta)).

    Raises:
        ValueError: beta is not between 0 and 1.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"there is no scale at beta={beta}: the divergence there is a limit already")
    return 1.0 / (4.0 * beta * (1.0 - beta))


def span_advantages(logprobs_M: Tensor, spans_M: Tensor, teacher_logprobs_S: Tensor) -> Tensor:
    """[M] by how much a teacher with another tokenizer likes the text that each token is part of, nats.

    For spans of text that are whole tokens of both, A = log T(span) - log S(span). A span is one step of the sampled text, so
    each of its tokens gets all of A: the gradient of -A log S(span) is in expectation that of KL(S || T) over spans.

    Args:
        logprobs_M: [M] of the sampled tokens under the student; taken as constants.
        spans_M: [M] the span of each token; -1 for none, whose advantage is 0.
        teacher_logprobs_S: [S] of each span's text.
    """
    own_M = logprobs_M.detach()
    is_in_M = spans_M >= 0
    own_S = torch.zeros_like(teacher_logprobs_S).index_add_(0, spans_M[is_in_M], own_M[is_in_M].to(teacher_logprobs_S))
    # The 0 at the end is what -1 finds.
    return torch.cat([teacher_logprobs_S - own_S, teacher_logprobs_S.new_zeros(1)])[spans_M]


def topk_jsd(student_logprobs_MK: Tensor, teacher_logprobs_MK: Tensor, is_there_MK: Tensor, *, beta: float) -> Tensor:
    """[M] generalised Jensen-Shannon divergence over the teacher's candidates and one bucket for all other tokens, nats.

    Args:
        student_logprobs_MK: [M, K] of the candidates under the policy; carries the gradient.
        teacher_logprobs_MK: [M, K] of the same candidates, constant.
        is_there_MK: [M, K] False where a position has fewer candidates.
        beta: see generalised_jsd.
    Raises:
        ValueError: beta is not within 0 and 1.
    """
    student_MB = _with_tail(student_logprobs_MK, is_there_MK)
    return generalised_jsd(student_MB, _with_tail(teacher_logprobs_MK.detach(), is_there_MK), beta=beta)


def _with_tail(logprobs_MK: Tensor, is_there_MK: Tensor) -> Tensor:
    """[M, K + 1] the candidates and, last, all the probability that they leave."""
    absent = math.log(SMALLEST)
    candidates_MK = torch.where(is_there_MK, logprobs_MK.clamp(max=0.0), absent)
    covered_M = torch.where(is_there_MK, candidates_MK.exp(), 0.0).sum(-1)
    tail_M = torch.log((1.0 - covered_M).clamp(min=SMALLEST))
    return torch.cat([candidates_MK, tail_M[:, None]], dim=-1)
