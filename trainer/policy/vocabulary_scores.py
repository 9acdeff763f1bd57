"""Logprobs of chosen tokens and entropies from logits, with few passes over the vocabulary.

A chunk of logits is the largest tensor of a training step. Written as plain operations, logprobs, entropies and their
gradients pass over it some twenty times, which on a CPU takes longer than the matrix product that made it. Here forward and
backward are one function that works in place, five passes each; the logits are kept as the output layer gave them, in half
the memory under bfloat16.

Shapes: C tokens of a chunk, V vocabulary, J tokens to score in each place.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def vocabulary_scores(
    logits_CV: Tensor, ids_CJ: Tensor, temperatures_C: Tensor, *, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """[C, J] logprobs of the ids at the temperatures, and [C] entropies, nats; both float32 or wider.

    Args:
        logits_CV: [C, V] before the temperature.
        entropy_grad: let gradients flow through the entropies; they carry none otherwise.
    """
    scores = _VocabularyScores.apply(logits_CV, ids_CJ, temperatures_C, entropy_grad)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", scores)


class _VocabularyScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, ids_CJ: Tensor, temperatures_C: Tensor, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        scaled_CV = _scaled(logits_CV, temperatures_C)
        probs_CV = torch.softmax(scaled_CV, dim=-1)
        largest_C, places_C = scaled_CV.max(dim=-1)
        # From the likeliest token, whose probability never vanishes.
        log_total_C = largest_C - probs_CV.gather(-1, places_C[:, None])[:, 0].log()
        logprobs_CJ = scaled_CV.gather(-1, ids_CJ) - log_total_C[:, None]
        entropies_C = log_total_C - probs_CV.mul_(scaled_CV).sum(dim=-1)
        ctx.save_for_backward(logits_CV, ids_CJ, temperatures_C, log_total_C, entropies_C)
        ctx.entropy_grad = entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies_C)
        return logprobs_CJ, entropies_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logprobs_grad_CJ, entropies_grad_C = gradients
        logits_CV, ids_CJ, temperatures_C, log_total_C, entropies_C = ctx.saved_tensors
        logprobs_CV = _scaled(logits_CV, temperatures_C).sub_(log_total_C[:, None])
        # d logprob_j / d z = onehot_j - p;  d entropy / d z = -p (logprob + entropy)
        factor_C1 = -logprobs_grad_CJ.sum(dim=-1, keepdim=True)
        if ctx.entropy_grad:
            slope_CV = logprobs_CV.add(entropies_C[:, None]).mul_(-entropies_grad_C[:, None]).add_(factor_C1)
            grad_CV = logprobs_CV.exp_().mul_(slope_CV)
        else:
            grad_CV = logprobs_CV.exp_().mul_(factor_C1)
        grad_CV.scatter_add_(-1, ids_CJ, logprobs_grad_CJ)
        return _divided(grad_CV, temperatures_C).to(logits_CV.dtype), None, None, None


def _scaled(logits_CV: Tensor, temperatures_C: Tensor) -> Tensor:
    """[C, V] a new tensor, float32 or wider: logits over temperatures."""
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32), copy=True)
    return _divided(wide_CV, temperatures_C)


def _divided(values_CV: Tensor, temperatures_C: Tensor) -> Tensor:
    """The tensor itself, divided in place."""
    # Elsewhere asking would wait for the device, and dividing costs little.
    if values_CV.device.type == "cpu" and bool((temperatures_C == 1).all()):
        return values_CV
    return values_CV.div_(temperatures_C[:, None])
