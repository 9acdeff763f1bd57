"""The start-up probe accepts engines that agree with the trainer and names why others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.trainer.fakes import tiny_llama
from trainer.policy.logprobs import PackedPolicy
from trainer.weight_sync.engines.sampling import Completion
from trainer.weight_sync.errors import NumericsError
from trainer.weight_sync.numerics import Cause, Scores, Verdict, check_prompt, judge, probe
from trainer.weight_sync.scoring import TEXTS, fixed_prompts, score_tokens

LIMIT = 0.1
M = 400
Floats = NDArray[np.float64]

logprobs = st.lists(st.floats(-15, 0), min_size=1, max_size=6)
noise = st.floats(-3, 3)


def scores(engine_M: Any, trainer_M: Any, unscaled_M: Any = None, places_M: Any = None) -> Scores:
    engine_M, trainer_M = np.asarray(engine_M, dtype=float), np.asarray(trainer_M, dtype=float)
    return Scores(
        engine_M,
        trainer_M,
        trainer_M if unscaled_M is None else np.asarray(unscaled_M, dtype=float),
        np.arange(len(engine_M)) if places_M is None else np.asarray(places_M),
    )


@pytest.fixture(name="trainer_M")
def some_logprobs() -> Floats:
    return -np.random.default_rng(0).exponential(1.5, M)


def noisy(values_M: Floats, size: float, seed: int = 1) -> Floats:
    noisy_M: Floats = values_M + np.random.default_rng(seed).normal(0, size, len(values_M))
    return noisy_M


def test_rounding_is_accepted(trainer_M: Floats) -> None:
    verdict = judge(scores(noisy(trainer_M, 0.03), trainer_M), LIMIT)

    assert verdict.cause is None
    assert verdict.mean_abs == pytest.approx(0.024, abs=0.005)
    assert verdict.max_abs == pytest.approx(0.09, abs=0.03)
    assert verdict.kl_k3 == pytest.approx(0.03**2 / 2, rel=0.3)


def test_raw_logprobs_are_told_by_the_unscaled_variant(trainer_M: Floats) -> None:
    raw_M = trainer_M * 0.6 - 0.3

    assert judge(scores(noisy(raw_M, 0.03), trainer_M, raw_M), LIMIT).cause is Cause.RAW_LOGPROBS


def test_raw_logprobs_are_refused_below_the_limit_too(trainer_M: Floats) -> None:
    raw_M = trainer_M + 0.05

    verdict = judge(scores(noisy(raw_M, 0.005), trainer_M, raw_M), LIMIT)

    assert verdict.mean_abs < LIMIT
    assert verdict.cause is Cause.RAW_LOGPROBS


def test_small_differences_to_both_sides_are_precision(trainer_M: Floats) -> None:
    assert judge(scores(noisy(trainer_M, 0.2), trainer_M), LIMIT).cause is Cause.PRECISION


def test_a_trainer_that_finds_the_tokens_less_likely_has_other_weights(trainer_M: Floats) -> None:
    assert judge(scores(noisy(trainer_M, 0.2) + 0.3, trainer_M), LIMIT).cause is Cause.WEIGHTS
    assert judge(scores(noisy(trainer_M, 3.0), trainer_M), LIMIT).cause is Cause.WEIGHTS


def test_a_difference_that_begins_late_is_one_of_positions(trainer_M: Floats) -> None:
    late_M = np.where(np.arange(M) > M / 2, 0.5, 0.0)

    assert judge(scores(noisy(trainer_M, 0.02) + late_M, trainer_M), LIMIT).cause is Cause.POSITIONS


@pytest.mark.parametrize("broken", [float("-inf"), float("nan"), -9999.0])
def test_infinite_logprobs_are_refused_whatever_the_limit(trainer_M: Floats, broken: float) -> None:
    engine_M = trainer_M.copy()
    engine_M[7] = broken

    assert judge(scores(engine_M, trainer_M), 1e9).cause is Cause.NOT_FINITE
    assert judge(scores(trainer_M, engine_M), 1e9).cause is Cause.NOT_FINITE
    assert judge(scores(engine_M, engine_M), 1e9).cause is Cause.NOT_FINITE


def test_no_tokens_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        judge(scores([], []), LIMIT)


@given(logprobs, st.data(), st.floats(0.01, 2))
def test_it_does_not_matter_who_is_the_engine(values: list[float], data: st.DataObject, limit: float) -> None:
    others = [value + data.draw(noise) for value in values]

    one, other = judge(scores(values, others), limit), judge(scores(others, values), limit)

    assert (one.cause is None) == (other.cause is None)
    assert one.mean_abs == pytest.approx(other.mean_abs)
    assert one.mean == pytest.approx(-other.mean)


@given(logprobs, st.data(), st.floats(0.01, 2), st.floats(1, 5))
def test_a_higher_limit_refuses_nothing_more(
    values: list[float], data: st.DataObject, limit: float, factor: float
) -> None:
    compared = scores([value + data.draw(noise) for value in values], values, [v + data.draw(noise) for v in values])

    if judge(compared, limit).cause is None:
        assert judge(compared, limit * factor).cause is None


class FakeEngine:
    """FAKE: samples at random, and reports what a model of its own says of the tokens."""

    url = "http://engine"

    def __init__(self, policy: PackedPolicy, *, is_raw: bool = False, noise: float = 0.0) -> None:
        self.policy = policy
        self.is_raw = is_raw
        self.noise = noise
        self.template = [1, 2]

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, **_: Any
    ) -> list[Completion]:
        generator = np.random.default_rng(0)
        completions = []
        for prompt in prompts:
            token_ids = generator.integers(0, 32, max_tokens).tolist()
            scored = score_tokens(self.policy, [*prompt, *token_ids], 1.0 if self.is_raw else temperature)
            exact_M = np.array(scored[len(prompt) - 1 :])
            completions.append(Completion(token_ids, (exact_M + generator.normal(0, self.noise, max_tokens)).tolist()))
        return completions

    def chat_token_ids(self, messages: Sequence[Any], **_: Any) -> list[int]:
        return [*self.template, *(len(message["content"]) for message in messages)]


@pytest.fixture(scope="module")
def policy() -> PackedPolicy:
    lm = tiny_llama()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(8)  # opinions strong enough for temperature to matter
    return PackedPolicy(lm, chunk_size=5)


def run(engine: FakeEngine, policy: PackedPolicy, **options: Any) -> list[Verdict]:
    prompts = fixed_prompts(None, vocabulary=32)
    return probe(engine, prompts, lambda ids, t: score_tokens(policy, ids, t), limit=LIMIT, **options)


def test_the_probe_passes_an_engine_with_the_same_weights(policy: PackedPolicy) -> None:
    verdicts = run(FakeEngine(policy, noise=0.02), policy, max_tokens=16)

    assert [verdict.tokens for verdict in verdicts] == [4 * 16, 4 * 16]
    assert all(verdict.mean_abs < 0.03 for verdict in verdicts)


def test_the_probe_names_a_server_with_raw_logprobs_and_the_flag_that_helps(policy: PackedPolicy) -> None:
    engine = FakeEngine(policy, is_raw=True, noise=0.02)

    with pytest.raises(
        NumericsError, match=r"http://engine .*temperature 0\.7 differ by .* nats.*raw(.|\n)*processed_logprobs"
    ):
        run(engine, policy)
    assert run(engine, policy, temperatures=[1.0])  # where there is no difference


def test_the_probe_refuses_other_weights(policy: PackedPolicy) -> None:
    with pytest.raises(NumericsError, match="it runs other weights"):
        run(FakeEngine(PackedPolicy(tiny_llama(seed=5), chunk_size=5)), policy)


def test_another_chat_template_is_named_with_the_place() -> None:
    engine = FakeEngine(PackedPolicy(tiny_llama(), chunk_size=5))
    check_prompt(engine, "hey", [1, 2, 3])

    with pytest.raises(NumericsError, match=r"from token 1 on(.|\n)*--chat-template"):
        check_prompt(engine, "hey", [1, 7, 3])
    with pytest.raises(NumericsError, match="3 tokens and the trainer's of 2 differ in length"):
        check_prompt(engine, "hey", [1, 2])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_scores_like_its_own_model(policy: PackedPolicy, temperature: float) -> None:
    token_ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        logits_TV = policy.lm(input_ids=torch.tensor([token_ids])).logits[0, :-1] / temperature
    expected = logits_TV.log_softmax(-1)[torch.arange(7), token_ids[1:]].tolist()
    policy.train()

    assert score_tokens(policy, token_ids, temperature) == pytest.approx(expected, abs=1e-4)
    assert policy.training


def test_prompts_are_the_same_every_time_and_within_the_vocabulary() -> None:
    arbitrary = fixed_prompts(None, vocabulary=32)
    encoded = fixed_prompts(lambda text: list(text.encode()), vocabulary=256)

    assert arbitrary == fixed_prompts(None, vocabulary=32)
    assert max(max(prompt) for prompt in arbitrary) < 32
    assert len({tuple(prompt) for prompt in arbitrary}) == len(TEXTS)
    assert encoded[0] == list(TEXTS[0].encode())[:32]
