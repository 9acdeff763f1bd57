"""SFT and GKD losses written down plainly: one example at a time, all logits, no packing, no chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.supervised.examples import Example


def logits_of(lm: Any, example: Example) -> tuple[Tensor, Tensor]:
    """[M, V] logits in the places that predict learnt tokens, and [M] those tokens."""
    ids_1T = torch.from_numpy(example.tokens_L).long()[None]
    places = torch.from_numpy(example.is_trained_L).nonzero()[:, 0]
    return lm(input_ids=ids_1T).logits[0, places - 1].float(), ids_1T[0, places]


def cross_entropy(lm: Any, examples: Sequence[Example]) -> Tensor:
    """Mean negative logprob over all learnt tokens."""
    parts = [logits_of(lm, example) for example in examples]
    costs = [torch.nn.functional.cross_entropy(logits, ids, reduction="sum") for logits, ids in parts]
    return torch.stack(costs).sum() / sum(len(ids) for _, ids in parts)


def divergence(
    student: Any, teacher: Any, examples: Sequence[Example], *, beta: float, temperature: float = 1.0
) -> Tensor:
    """Mean generalised JSD over all learnt tokens, with probabilities instead of their logarithms."""
    costs = []
    for example in examples:
        own = (logits_of(student, example)[0] / temperature).softmax(-1)
        with torch.no_grad():
            other = (logits_of(teacher, example)[0] / temperature).softmax(-1)
        if beta == 0:
            costs.append((other * (other / own).log()).sum(-1))
        elif beta == 1:
            costs.append((own * (own / other).log()).sum(-1))
        else:
            mixed = beta * other + (1 - beta) * own
            of_teacher, of_student = ((p * (p / mixed).log()).sum(-1) for p in (other, own))
            costs.append(beta * of_teacher + (1 - beta) * of_student)
    return torch.cat(costs).mean()


def step_of_descent(lm: Any, loss: Tensor, *, learning_rate: float) -> dict[str, Tensor]:
    """The parameters after one step of plain gradient descent."""
    gradients = torch.autograd.grad(loss, list(lm.parameters()))
    named = [name for name, _ in lm.named_parameters()]
    old = dict(lm.named_parameters())
    return {name: (old[name] - learning_rate * g).detach() for name, g in zip(named, gradients, strict=True)}
