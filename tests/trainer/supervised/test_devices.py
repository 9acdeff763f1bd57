"""A teacher on a device of its own: what it says comes to the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.trainer.supervised.fakes import ROWS, tiny_model
from tests.trainer.supervised.test_sft_trainer import examples_of
from trainer.policy.loading import build_policy
from trainer.supervised.distilled_policy import DistilledPolicy, Divergence
from trainer.supervised.passes import Pass, build_pass
from trainer.supervised.teacher import Teacher


class Far:
    """Logits on another device: nothing can be done with them here."""

    def __init__(self, logits_CV: torch.Tensor) -> None:
        self._logits_CV = logits_CV

    def float(self) -> Far:
        return self

    def to(self, _: torch.device) -> torch.Tensor:
        return self._logits_CV.float()


class FarHead(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = head

    def forward(self, hidden_CH: torch.Tensor) -> Any:
        return Far(self._head(hidden_CH))


def scores(head: nn.Module, teacher: Teacher, each: Pass) -> Any:
    student = DistilledPolicy(tiny_model(), chunk_size=8, divergence=Divergence(0.5))
    student.learn_from(head)
    ones_M = torch.ones_like(each.weights_M)
    segments = (each.segments_1T, each.segments_1T)
    columns = (each.input_ids_1T, each.position_ids_1T, *segments, each.target_positions_M, each.target_ids_M, ones_M)
    return student(*columns, teacher_hidden_MH=teacher.hidden(each))


def test_the_teachers_logits_come_to_the_students_device() -> None:
    lm = tiny_model(1)
    teacher = Teacher(build_policy(lm, logprob_chunk_size=8), None)
    each = build_pass(examples_of(ROWS[:2]), weight=1.0)

    near, far = scores(lm.lm_head, teacher, each), scores(FarHead(lm.lm_head), teacher, each)

    torch.testing.assert_close(far.divergences_M, near.divergences_M)


def test_a_pass_goes_to_the_teachers_device() -> None:
    # No second device is needed for this one: meta is everywhere.
    lm = tiny_model(1)
    teacher = Teacher(build_policy(lm, logprob_chunk_size=8), None)
    lm.to("meta")
    each = build_pass(examples_of(ROWS[:1]), weight=1.0)

    hidden_MH = teacher.hidden(each)

    assert hidden_MH.device.type == "meta"
    assert hidden_MH.shape == (len(each.target_ids_M), lm.config.hidden_size)
