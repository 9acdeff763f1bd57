"""What the comparison with a teacher costs: passes over the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.supervised.fakes import tiny_model
from trainer.supervised.distilled_policy import DistilledPolicy, Divergence

SOFTMAXES = (torch.ops.aten._log_softmax.default, torch.ops.aten._softmax.default)


class Count(TorchDispatchMode):
    """How often a distribution over the vocabulary is made of logits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.softmaxes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.softmaxes += func in SOFTMAXES
        return func(*args, **(kwargs or {}))


def compared(temperature: float) -> tuple[tuple[torch.Tensor, ...], int]:
    student = DistilledPolicy(tiny_model(0), chunk_size=8, divergence=Divergence(0.5, temperature))
    student.learn_from(tiny_model(1).lm_head)
    hidden = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    with Count() as count, torch.no_grad():
        scores = student._distil(hidden[0], hidden[1], torch.tensor([1, 2, 3, 4]))
    return scores, count.softmaxes


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 2), (0.7, 4)])
def test_each_distribution_is_made_once(temperature: float, expected: int) -> None:
    assert compared(temperature)[1] == expected


def test_the_plain_figures_are_at_temperature_one_whatever_the_losss() -> None:
    (logprobs, _, cross_entropies), _ = compared(1.0)
    (at_other, _, other_entropies), _ = compared(0.7)

    torch.testing.assert_close(at_other, logprobs)
    torch.testing.assert_close(other_entropies, cross_entropies)
