"""Servers are probed when they are first met, and training does not start when none computes as the trainer does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.engines.sampling import Completion
from trainer.weight_sync.errors import NumericsError, ServerSyncError, WeightSyncError
from trainer.weight_sync.guard import GuardedPublisher, NumericsGuard

PROMPTS = [[5, 6, 7], [8, 9, 10]]


def score(token_ids: Sequence[int], temperature: float) -> list[float]:
    return [-float(token % 5) / temperature - 0.1 for token in token_ids[1:]]


class FakeEngine:
    """Computes as `score` does, plus an error."""

    engine = "vllm"

    def __init__(self, url: str = "http://a", *, error: float = 0.0, template: Sequence[int] = (1, 2)) -> None:
        self.url, self.error, self.template = url, error, list(template)
        self.sampled = self.scored = 0

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, **_: Any
    ) -> list[Completion]:
        self.sampled += 1
        ids = [(i * 7) % 11 for i in range(max_tokens)]
        return [
            Completion(ids, [lp + self.error for lp in score([*prompt, *ids], temperature)[len(prompt) - 1 :]])
            for prompt in prompts
        ]

    def prompt_logprobs(self, token_ids: Sequence[int], **_: Any) -> list[float]:
        self.scored += 1
        return [lp + self.error for lp in score(token_ids, 1.0)]

    def chat_token_ids(self, messages: Any, **_: Any) -> list[int]:
        return self.template


def a_guard(**options: Any) -> NumericsGuard:
    chat_ids = options.pop("chat_ids", None)
    return NumericsGuard(WeightSyncConfig(**options), score, PROMPTS, chat_ids=chat_ids)


def publish_to(guard: NumericsGuard, *engines: Any, version: int = 0) -> None:
    """As a publication does it."""
    with guard.scoring():
        guard.expect(version)
        for engine in engines:
            guard.prove(engine, str(version))


def test_a_server_is_probed_once_and_fingerprinted_when_it_is_due() -> None:
    guard, engine = a_guard(fingerprint_every=3), FakeEngine()
    counts = []
    for version in range(4):
        publish_to(guard, engine, version=version)
        counts.append((engine.sampled, engine.scored))

    # Two temperatures; a fingerprint is two prompts, and the publication before a proof is scored too.
    assert [sampled for sampled, _ in counts] == [2, 2, 2, 2]
    assert [scored for _, scored in counts] == [2, 2, 4, 6]


def test_no_server_that_computes_otherwise_is_trained_on() -> None:
    guard = a_guard()

    with pytest.raises(ServerSyncError, match=r"http://a .* disagree"):
        publish_to(guard, FakeEngine(error=-1.0))
    with pytest.raises(NumericsError, match="disagree"):
        guard.raise_refused()


def test_one_good_server_is_enough_to_train() -> None:
    guard = a_guard()
    with pytest.raises(ServerSyncError):
        publish_to(guard, FakeEngine("http://bad", error=-1.0))
    publish_to(guard, FakeEngine("http://good"))

    guard.raise_refused()

    assert set(guard.refused) == {"http://bad"}


def test_the_probe_can_be_switched_off() -> None:
    engine = FakeEngine(error=-1.0)

    a_guard(probe=False, fingerprint_every=0).prove(engine, "0")  # type: ignore[arg-type]

    assert (engine.sampled, engine.scored) == (0, 0)


@pytest.mark.parametrize(("template", "is_said"), [((1, 2), False), ((1, 3), True)])
def test_another_chat_template_is_said_and_no_reason_to_stop(
    template: tuple[int, ...], is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    guard = a_guard(chat_ids=lambda text: [1, 2])
    with caplog.at_level(logging.WARNING):
        publish_to(guard, FakeEngine(template=template))

    assert ("chat route" in caplog.text) is is_said


def test_a_chat_template_that_fails_is_said_and_no_reason_to_stop(caplog: pytest.LogCaptureFixture) -> None:
    def fails(text: str) -> list[int]:
        raise TypeError("the template wants a system message")

    publish_to(a_guard(chat_ids=fails), FakeEngine())

    assert "the template wants a system message" in caplog.text


@pytest.mark.parametrize("is_publishing_again", [False, True])
def test_a_proof_that_outlasts_its_publication_touches_the_policy_no_more(is_publishing_again: bool) -> None:
    scored: list[int] = []

    def count(token_ids: Sequence[int], temperature: float) -> list[float]:
        scored.append(1)
        return score(token_ids, temperature)

    guard = NumericsGuard(WeightSyncConfig(fingerprint_every=0), count, PROMPTS)

    class Late(FakeEngine):
        """Its answer comes after the publication that asked for it."""

        def sample(self, *args: Any, **options: Any) -> list[Completion]:
            publication.close()
            if is_publishing_again:
                publication.enter_context(guard.scoring())
            return super().sample(*args, **options)

    with ExitStack() as publication:
        publication.enter_context(guard.scoring())
        with pytest.raises(ServerSyncError, match="longer than its publication"):
            guard.prove(Late(), "0")  # type: ignore[arg-type]

    assert scored == []
    assert guard.refused == {}


class FakePooled:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.versions: list[int] = []

    def ensure_current(self, version: int, weights: Any) -> str:
        return self.publish(version, weights)

    def publish(self, version: int, weights: Any) -> str:
        self.versions.append(version)
        if self.error is not None:
            raise self.error
        return "result"


@pytest.mark.parametrize("way", ["publish", "ensure_current"])
def test_a_publication_that_nobody_took_ends_in_the_probes_reason(way: str) -> None:
    guard = a_guard()
    guard.refused["http://a"] = NumericsError("http://a", figures="1 nat", cause="other weights", fix="mend it")

    with pytest.raises(NumericsError, match="other weights"):
        getattr(GuardedPublisher(FakePooled(WeightSyncError("nobody")), guard), way)(0, ())  # type: ignore[arg-type]


def test_a_publication_that_failed_otherwise_keeps_its_reason() -> None:
    with pytest.raises(WeightSyncError, match="nobody"):
        GuardedPublisher(FakePooled(WeightSyncError("nobody")), a_guard()).publish(0, ())  # type: ignore[arg-type]
