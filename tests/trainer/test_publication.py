"""When weights are published, and what the rollout server is told."""

from __future__ import annotations

import pytest
import torch

from atroposlib.errors import ConfigError
from tests.trainer.fakes import FakePublisher
from trainer.run import publication
from trainer.run.publication import Publication, is_published, longest_s


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "IDLE_CHECK_S", 0.0)


def a_publication(publisher: FakePublisher | None, announced: list[int], *, engine_version: int = -1) -> Publication:
    return Publication(publisher, announce=announced.append, engine_version=engine_version)


def test_the_first_version_is_published_and_announced() -> None:
    publisher, announced = FakePublisher(), list[int]()

    a_publication(publisher, announced).start(0, [])

    assert publisher.published == announced == [0]


def test_each_step_returns_the_version_to_acknowledge() -> None:
    publisher = FakePublisher()
    keeper = a_publication(publisher, [])
    keeper.start(0, [])

    assert [keeper.after_step(1, []), keeper.after_step(2, [])] == [1, 2]
    assert publisher.published == [0, 1, 2]


def test_when_no_engine_takes_a_version_training_goes_on_without_one() -> None:
    publisher = FakePublisher()
    keeper = a_publication(publisher, [])
    keeper.start(0, [])
    publisher.is_up = False

    assert keeper.after_step(1, []) is None


def test_an_engine_that_comes_back_gets_the_weights_while_the_trainer_waits() -> None:
    publisher, announced = FakePublisher(), list[int]()
    publisher.is_up = False
    keeper = a_publication(publisher, announced)
    keeper.start(0, [])
    keeper.while_idle()
    assert announced == []

    publisher.is_up = True
    keeper.while_idle()
    keeper.while_idle()

    assert announced == [0]


def test_a_resumed_trainer_publishes_nothing_older_than_the_engines_run() -> None:
    publisher, announced = FakePublisher(), list[int]()
    keeper = a_publication(publisher, announced, engine_version=7)

    keeper.start(5, [])
    keeper.while_idle()
    versions = [keeper.after_step(version, []) for version in (6, 7, 8)]

    assert versions == [None, 7, 8]
    assert publisher.published == [7, 8]
    assert announced == []
    assert publisher.checks == 0


def test_without_engines_the_version_follows_the_step() -> None:
    announced: list[int] = []
    keeper = a_publication(None, announced)

    keeper.start(0, [])

    assert announced == [0]
    assert keeper.after_step(1, []) == 1


def test_what_is_sent_again_are_the_weights_of_the_last_step() -> None:
    publisher = FakePublisher()
    keeper = a_publication(publisher, [])
    keeper.start(0, [("w", torch.zeros(1))])
    keeper.after_step(1, [("w", torch.ones(1))])
    publisher.weights = {}

    keeper.while_idle()

    assert publisher.weights == {"w": torch.ones(1)}
    assert publisher.published[-1] == 1


def test_a_version_that_is_not_published_needs_no_weights() -> None:
    assert not is_published(6, engine_version=7)
    assert is_published(7, engine_version=7)


def test_the_bound_on_a_publication_follows_the_timeout() -> None:
    assert 3 * 60 < longest_s(60.0) < 1800 - 600
    assert longest_s(30.0) < longest_s(60.0)


@pytest.mark.parametrize("where", ["attach", "publish", "ensure_current"])
def test_servers_that_can_never_get_weights_end_the_run(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    publisher = FakePublisher()

    def refuse(*_: object) -> None:
        raise ConfigError("delta is for vLLM")

    monkeypatch.setattr(publisher, where, refuse)
    keeper = a_publication(publisher, [])

    def run() -> None:
        keeper.start(0, [])
        keeper.while_idle()

    with pytest.raises(ConfigError, match="delta is for vLLM"):
        run()
