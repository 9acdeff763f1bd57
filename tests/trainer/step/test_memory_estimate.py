"""What training takes of memory, estimated from sizes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.fakes import FakePublisher, FakeRolloutServer, a_config, tiny_llama
from trainer.grpo_trainer import GRPOTrainer
from trainer.step.memory_estimate import MemoryEstimate, estimate

MIB, GIB = 2**20, 2**30


def of_a_billion(**changes: Any) -> MemoryEstimate:
    """2**30 float32 weights, all trained; 1024 tokens of a vocabulary of 2**16 make logits of 256 MiB."""
    sizes: dict[str, Any] = {
        "weight_bytes": 4 * GIB,
        "trained_bytes": 4 * GIB,
        "trained_parameters": GIB,
        "zero_stage": 0,
        "ranks": 1,
        "pass_tokens": 1024,
        "chunk_size": 256,
        "vocabulary": 2**16,
    }
    return estimate(**{**sizes, **changes})


def test_weights_gradients_two_moments_and_logits_are_counted() -> None:
    found = of_a_billion()

    assert found == MemoryEstimate(
        weights=4 * GIB, gradients=4 * GIB, optimizer_state=8 * GIB, logits=(256 + 2 * 64) * MIB
    )
    assert found.total == 16 * GIB + 384 * MIB


@pytest.mark.parametrize(
    ("zero_stage", "ranks", "expected_gib"),
    # The optimizer of DeepSpeed has a float32 copy of the weights: 12 bytes for each.
    [(0, 4, (4, 4, 8)), (1, 4, (4, 4, 3)), (2, 4, (4, 1, 3)), (3, 4, (1, 1, 3)), (1, 1, (4, 4, 12))],
)
def test_each_zero_stage_splits_more_over_the_ranks(
    zero_stage: int, ranks: int, expected_gib: tuple[int, int, int]
) -> None:
    found = of_a_billion(zero_stage=zero_stage, ranks=ranks)

    assert (found.weights, found.gradients, found.optimizer_state) == tuple(gib * GIB for gib in expected_gib)


def test_under_an_adapter_only_the_adapter_has_gradients_and_state() -> None:
    found = of_a_billion(trained_bytes=40 * MIB, trained_parameters=10 * MIB)

    assert (found.weights, found.gradients, found.optimizer_state) == (4 * GIB, 40 * MIB, 80 * MIB)


@pytest.mark.parametrize(
    ("pass_tokens", "chunk_size", "expected_mib"),
    [(2048, 256, 512 + 2 * 64), (2049, 256, 3 * 64), (100, 256, 3 * 25)],
    ids=["kept", "made-again", "less-than-a-chunk"],
)
def test_logits_are_kept_up_to_a_bound_and_above_it_made_again_chunk_by_chunk(
    pass_tokens: int, chunk_size: int, expected_mib: int
) -> None:
    assert of_a_billion(pass_tokens=pass_tokens, chunk_size=chunk_size).logits == expected_mib * MIB


def test_a_run_says_at_its_start_what_it_will_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    policy = tiny_llama()
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    config = a_config(tmp_path, max_steps=1)

    GRPOTrainer(config, model=policy, connect=FakeRolloutServer().client, publisher=FakePublisher()).train()

    (record,) = [record for record in caplog.records if "an estimate" in record.getMessage()]
    # 24 tokens of a vocabulary of 32, and two more chunks of 5.
    logits = 4 * 32 * (24 + 2 * 5)
    assert isinstance(record.args, tuple)
    expected = [16 * parameters + logits, 4 * parameters, 4 * parameters, 8 * parameters, logits]
    assert [size * GIB for size in record.args[:5] if isinstance(size, float)] == pytest.approx(expected)
    assert "passes of 24 tokens" in record.getMessage()
