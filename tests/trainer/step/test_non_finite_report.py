"""A run that ends because its losses stay no numbers leaves a file that says what the last batch was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from atroposlib.wire.columns import Group
from tests.trainer.fakes import FakePublisher, FakeRolloutServer, a_config, a_group, random_groups, tiny_llama
from trainer.batches.step_batch import StepBatch, build_step_batch
from trainer.errors import NonFiniteError
from trainer.grpo_trainer import GRPOTrainer
from trainer.reporting.non_finite import write_report

HUGE = 3e38
"""An advantage: finite, and too large for what is computed with it."""


def poisoned(step: int) -> list[Group]:
    groups = random_groups(step, sequences=8)
    huge = np.full(groups[0].n_tokens, HUGE, dtype=np.float32)
    return [Group(**{**vars(groups[0]), "advantages": huge}), *groups[1:]]


def a_batch(*groups: Group) -> StepBatch:
    return build_step_batch(5, groups, advantage_scale="none", overlong="mask", temperature=1.0)


def test_the_error_names_a_file_with_the_batch_of_the_last_step(tmp_path: Path) -> None:
    trainer = GRPOTrainer(
        a_config(tmp_path, max_steps=9),
        model=tiny_llama(),
        connect=FakeRolloutServer(batches=poisoned).client,
        publisher=FakePublisher(),
    )

    with pytest.raises(NonFiniteError) as caught:
        trainer.train()

    path = tmp_path / "non_finite_step_2.json"
    assert str(path) in str(caught.value)
    assert list(tmp_path.glob("non_finite*")) == [path]
    report, groups = json.loads(path.read_text()), poisoned(2)
    assert [group["group_id"] for group in report["groups"]] == [group.group_id for group in groups]
    scores = [[sequence["score"] for sequence in group["sequences"]] for group in report["groups"]]
    assert scores == [group.scores.tolist() for group in groups]
    largest = [[sequence["advantages_min_max"][1] for sequence in group["sequences"]] for group in report["groups"]]
    assert all(value == pytest.approx(HUGE) for value in largest[0])
    assert all(value <= 1 for values in largest[1:] for value in values)
    assert report["figures"]["loss/total"] in ("nan", "inf", "-inf")
    assert report["figures"]["step/skipped"] == 1


def test_each_sequence_is_described_without_its_tokens(tmp_path: Path) -> None:
    group = a_group("g", completions=[(7, 3), (4, 5, 6)], version=4, finish_reasons=("stop", "length"))
    logprobs = np.array([0, 0, -3, -0.5, 0, 0, -1, -1, -1], dtype=np.float32)
    group = Group(**{**vars(group), "inference_logprobs": logprobs})

    path = write_report(tmp_path, a_batch(group), {"grad_norm": math.nan, "loss/total": -math.inf, "entropy": 0.5})

    assert path is not None
    assert json.loads(path.read_text()) == {
        "step": 5,
        "figures": {"grad_norm": "nan", "loss/total": "-inf", "entropy": 0.5},
        "groups": [
            {
                "group_id": "g",
                "sequences": [
                    {
                        "score": 1.0,
                        "tokens": 4,
                        "completion_tokens": 2,
                        "trained_tokens": 2,
                        "is_truncated": False,
                        "oldest_version": 4,
                        "temperature": 1.0,
                        "advantages_min_max": [0.5, 0.5],
                        "inference_logprobs_min_max": [-3.0, -0.5],
                        "ref_logprobs_min_max": None,
                    },
                    {
                        "score": 0.0,
                        "tokens": 5,
                        "completion_tokens": 3,
                        "trained_tokens": 0,
                        "is_truncated": True,
                        "oldest_version": None,
                        "temperature": 1.0,
                        "advantages_min_max": None,
                        "inference_logprobs_min_max": None,
                        "ref_logprobs_min_max": None,
                    },
                ],
            }
        ],
    }


def test_a_report_that_cannot_be_written_leaves_the_error_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert write_report(tmp_path / "gone", a_batch(a_group("g")), {}) is None
    assert "non_finite_step_5.json cannot be written: No such file" in caplog.text
    assert "has those of the batch" not in str(NonFiniteError(5, in_a_row=3, report=None))
