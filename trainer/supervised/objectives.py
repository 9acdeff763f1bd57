"""What a pass costs: the negative logprob of its tokens, or what a teacher thinks of them.

Shapes: M learnt tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.losses.distillation import span_advantages
from trainer.supervised.examples import Example
from trainer.supervised.passes import Pass
from trainer.supervised.teacher import Teacher, score


@dataclass(frozen=True)
class PassLoss:
    """Of one pass."""

    total: Tensor
    """Its share of the loss of the step; carries the gradient."""
    sums: Mapping[str, Tensor]
    """What is added up over passes and ranks; `tokens` is what means are divided by."""


class Objective(Protocol):
    """What the trainer learns."""

    def completed(self, step: int, examples: Sequence[Example]) -> list[Example]:
        """The examples of a step, with the completions that are learnt. Every rank calls this, and has the same answer."""

    def loss(self, model: Any, each: Pass) -> PassLoss:
        """The loss of a pass, on the model's device."""


class CrossEntropy:
    """The mean negative logprob of the learnt tokens."""

    def completed(self, step: int, examples: Sequence[Example]) -> list[Example]:
        """See Objective."""
        del step
        return list(examples)

    def loss(self, model: Any, each: Pass) -> PassLoss:
        """See Objective."""
        scores = score(model, each)
        counts_M = each.weights_M > 0
        total = -(each.weights_M * scores.logprobs_M).sum()
        sums = {
            "loss": total,
            "tokens": counts_M.sum(),
            "nll": -scores.logprobs_M[counts_M].double().sum(),
            "entropy": scores.entropies_M[counts_M].double().sum(),
        }
        return PassLoss(total, sums)


class TokenDivergence:
    """The mean divergence from a teacher with the student's tokenizer, over the whole vocabulary. Wants a DistilledPolicy."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def loss(self, model: Any, each: Pass) -> PassLoss:
        """See Objective."""
        scores = model(
            each.input_ids_1T,
            each.position_ids_1T,
            each.segments_1T,
            each.segments_1T,
            each.target_positions_M,
            each.target_ids_M,
            torch.ones_like(each.weights_M),
            teacher_hidden_MH=self._teacher.hidden(each),
        )
        counts_M = each.weights_M > 0
        total = (each.weights_M * scores.divergences_M).sum()
        sums = {
            "loss": total,
            "tokens": counts_M.sum(),
            "nll": -scores.logprobs_M[counts_M].double().sum(),
            "teacher_cross_entropy": scores.cross_entropies_M[counts_M].double().sum(),
            "sampled": (counts_M & each.is_sampled_M).sum(),
        }
        return PassLoss(total, sums)


class SpanDivergence:
    """With a teacher of another tokenizer. What the student sampled is learnt by how much the teacher likes its spans of text
    (the policy gradient of KL(student || teacher)); completions of the data or the teacher by their negative logprob.
    """

    def loss(self, model: Any, each: Pass) -> PassLoss:
        """See Objective."""
        scores = score(model, each)
        logprobs_M, counts_M = scores.logprobs_M, each.weights_M > 0
        own_M = logprobs_M.detach()
        factor_M, reverse_kl, in_spans = (
            torch.where(each.is_sampled_M, 0.0, 1.0),
            own_M.new_zeros(()),
            own_M.new_zeros(()),
        )
        if each.spans_M is not None and each.teacher_logprobs_S is not None:
            factor_M = factor_M + span_advantages(own_M, each.spans_M, each.teacher_logprobs_S)
            is_in_M = each.spans_M >= 0
            reverse_kl, in_spans = own_M[is_in_M].sum() - each.teacher_logprobs_S.sum(), is_in_M.sum()
        is_data_M = counts_M & ~each.is_sampled_M
        sums = {
            # The value of a policy gradient says nothing: what it lowers is the divergence.
            "loss": each.weights_M.max() * (reverse_kl - own_M[is_data_M].sum()),
            "tokens": counts_M.sum(),
            "nll": -own_M[counts_M].double().sum(),
            "sampled": (counts_M & each.is_sampled_M).sum(),
            "in_spans": in_spans,
        }
        return PassLoss(-(each.weights_M * factor_M * logprobs_M).sum(), sums)
