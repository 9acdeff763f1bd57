"""The fingerprint tells servers that run the published weights from those that only say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.weight_sync.engines.control import EngineControl
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.fingerprint import Evidence, Fingerprint, Outcome, compare
from trainer.weight_sync.states import Edge

LIMIT = 0.1
M = 120
Floats = NDArray[np.float64]


def normal(seed: int, size: float) -> Floats:
    values_M: Floats = np.random.default_rng(seed).normal(0, size, M)
    return values_M


OLD_M = -np.random.default_rng(0).exponential(2.0, M)


def outcome(
    engine_M: Floats, new_M: Floats, old_M: Floats | None = OLD_M, *, engine_before_M: Floats | None = None
) -> Outcome:
    return compare(Evidence(engine_M, new_M, old_M, engine_before_M), LIMIT).outcome


def test_the_first_version_is_proven_by_the_limit_alone() -> None:
    assert outcome(OLD_M + normal(1, 0.03), OLD_M, None) is Outcome.PROVEN
    assert outcome(OLD_M + normal(1, 0.5), OLD_M, None) is Outcome.WRONG


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [0.03, 0.05, 0.5, 3.0])
def test_new_weights_are_told_from_old_ones_by_steps_as_small_as_the_noise(seed: int, step: float) -> None:
    new_M = OLD_M + normal(10 + seed, step)

    assert outcome(new_M + normal(20 + seed, 0.03), new_M) is Outcome.PROVEN
    assert outcome(OLD_M + normal(20 + seed, 0.03), new_M) is Outcome.STALE


@pytest.mark.parametrize("seed", range(5))
def test_a_step_far_below_the_noise_is_neither_proof_nor_failure(seed: int) -> None:
    new_M = OLD_M + normal(10 + seed, 0.003)

    assert outcome(new_M + normal(20 + seed, 0.03), new_M) is Outcome.CANNOT_TELL
    assert outcome(OLD_M + normal(20 + seed, 0.03), new_M) is Outcome.CANNOT_TELL


def test_a_step_of_nothing_cannot_be_told() -> None:
    assert outcome(OLD_M, OLD_M) is Outcome.CANNOT_TELL


def test_the_very_same_answer_after_a_step_unmasks_a_server_even_below_the_noise() -> None:
    new_M = OLD_M + normal(1, 0.003)
    answer_M = OLD_M + normal(2, 0.03)

    assert outcome(answer_M, new_M, engine_before_M=answer_M) is Outcome.STALE
    assert outcome(answer_M, new_M, engine_before_M=answer_M + normal(3, 1e-3)) is Outcome.CANNOT_TELL


def test_the_same_answer_is_no_failure_where_the_step_may_be_lost_in_rounding() -> None:
    answer_M = OLD_M + normal(2, 0.03)

    assert outcome(answer_M, OLD_M + normal(1, 1e-5), engine_before_M=answer_M) is Outcome.CANNOT_TELL
    assert outcome(answer_M, OLD_M, engine_before_M=answer_M) is Outcome.CANNOT_TELL


def test_weights_of_neither_version_are_wrong() -> None:
    new_M = OLD_M + normal(1, 0.3)

    assert outcome(OLD_M + normal(2, 1.0), new_M) is Outcome.WRONG
    assert outcome(np.full(M, math.nan), new_M) is Outcome.WRONG
    assert outcome(np.full(M, math.nan), new_M, None) is Outcome.WRONG


def test_half_an_update_is_no_proof() -> None:
    new_M = OLD_M + normal(1, 0.1)

    assert outcome((OLD_M + new_M) / 2 + normal(2, 0.01), new_M) is not Outcome.PROVEN


@given(seed=st.integers(0, 10_000), step=st.floats(1e-4, 2), noise=st.floats(1e-4, 0.1))
def test_rounding_never_makes_a_good_server_look_bad_nor_a_stale_one_look_good(
    seed: int, step: float, noise: float
) -> None:
    new_M = OLD_M + normal(seed, step)
    error_M = normal(seed + 1, noise)

    assert outcome(new_M + error_M, new_M) in (Outcome.PROVEN, Outcome.CANNOT_TELL)
    assert outcome(OLD_M + error_M, new_M) is not Outcome.PROVEN


class FakeControl:
    """FAKE server: answers with the logprobs of a version, and a little noise."""

    def __init__(self, runs: float) -> None:
        self.url = "http://engine"
        self.runs = runs
        self.asked: list[dict[str, Any]] = []

    def prompt_logprobs(self, token_ids: Sequence[int], **options: Any) -> list[float]:
        self.asked.append(options)
        return [value + 0.01 * (-1) ** i for i, value in enumerate(logprobs_of(self.runs, token_ids))]


def logprobs_of(version: float, token_ids: Sequence[int]) -> list[float]:
    return [-2.0 + 0.4 * math.sin(version * (i + 1) + token_id) for i, token_id in enumerate(token_ids[1:])]


class Trainer:
    """Publishes versions 0, 1, 2, ... and counts how often it had to score."""

    def __init__(self, pace: float = 1.0, **options: Any) -> None:
        self.version = -1
        self.pace = pace
        self.scored = 0
        prompts = [list(range(20)), list(range(5, 25))]
        self.fingerprint = Fingerprint(prompts, self._score, **{"every": 1, "limit": LIMIT, **options})

    def publish(self) -> str:
        self.version += 1
        self.fingerprint.expect(str(self.version))
        return str(self.version)

    def prove(self, control: FakeControl) -> None:
        self.fingerprint.prove(cast(EngineControl, control), str(self.version))

    def _score(self, token_ids: Sequence[int]) -> list[float]:
        self.scored += 1
        return logprobs_of(self.version * self.pace, token_ids)


def test_a_server_that_took_the_weights_is_proven() -> None:
    trainer = Trainer()
    for _ in range(3):
        trainer.publish()
        trainer.prove(FakeControl(runs=trainer.version))

    assert trainer.fingerprint.counts == {Outcome.PROVEN: 3}


def test_a_server_that_was_told_a_version_without_its_weights_is_named_with_the_figures() -> None:
    trainer = Trainer()
    trainer.publish()
    trainer.publish()

    with pytest.raises(
        ServerSyncError, match=r"http://engine failed to verify: .*version 1.*limit 0\.1.*by 0\.01 "
    ) as e:
        trainer.prove(FakeControl(runs=0))

    assert e.value.edge is Edge.VERIFY
    assert "did not take the update" in str(e.value)
    assert trainer.fingerprint.counts == {Outcome.STALE: 1}


def test_a_server_with_foreign_weights_is_refused() -> None:
    trainer = Trainer()
    trainer.publish()

    with pytest.raises(ServerSyncError, match="other weights"):
        trainer.prove(FakeControl(runs=77))


def test_a_step_that_changes_nothing_is_counted_and_passes() -> None:
    trainer = Trainer()
    trainer.publish()
    trainer.publish()
    trainer.fingerprint.expect("2")  # the same weights once more

    trainer.fingerprint.prove(cast(EngineControl, FakeControl(runs=1)), "2")

    assert trainer.fingerprint.counts == {Outcome.CANNOT_TELL: 1}


def test_between_proofs_nobody_is_asked_and_nothing_scored_but_for_the_version_before() -> None:
    trainer = Trainer(every=4)
    control = FakeControl(runs=0)
    asked, scored = [], []
    for _ in range(9):
        trainer.publish()
        control.runs = trainer.version
        trainer.prove(control)
        asked.append(len(control.asked) // 2)
        scored.append(trainer.scored // 2)

    assert asked == scored == [1, 1, 1, 2, 3, 3, 3, 4, 5]
    assert trainer.fingerprint.counts == {Outcome.PROVEN: 3}


def test_a_small_step_that_a_server_did_not_take_is_found_by_its_unchanged_answer() -> None:
    trainer = Trainer(every=1, pace=1e-3)
    control = FakeControl(runs=0)
    trainer.publish()
    trainer.prove(control)
    trainer.publish()

    with pytest.raises(ServerSyncError, match="did not take the update"):
        trainer.prove(control)
    control.runs = 1e-3  # it was sent once more
    trainer.prove(control)

    assert trainer.fingerprint.counts == {Outcome.PROVEN: 1, Outcome.STALE: 1, Outcome.CANNOT_TELL: 1}


def test_a_stale_server_is_found_with_proofs_far_apart() -> None:
    trainer = Trainer(every=4)
    for _ in range(5):
        trainer.publish()

    with pytest.raises(ServerSyncError, match="did not take the update"):
        trainer.prove(FakeControl(runs=3))


def test_never_means_never() -> None:
    trainer, control = Trainer(every=0), FakeControl(runs=77)
    trainer.publish()
    trainer.prove(control)

    assert (trainer.scored, control.asked) == (0, [])


def test_an_older_version_has_no_proof_any_more() -> None:
    trainer = Trainer()
    trainer.publish()
    trainer.publish()

    trainer.fingerprint.prove(cast(EngineControl, FakeControl(runs=77)), "0")

    assert trainer.fingerprint.counts == {}


def test_an_adapter_is_asked_by_its_name_and_within_the_deadline() -> None:
    trainer, control = Trainer(model="pol", timeout_s=7), FakeControl(runs=0)
    trainer.publish()
    trainer.prove(control)

    assert {asked["model"] for asked in control.asked} == {"pol"}
    assert all(0 < asked["timeout_s"] <= 7 for asked in control.asked)


def test_a_prompt_of_one_token_says_nothing() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Fingerprint([[1]], lambda ids: [], every=1, limit=LIMIT)
