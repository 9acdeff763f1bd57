"""What a publication promises whichever engine the servers run, against FAKE ones that receive over real gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.trainer.weight_sync.fake_vllm import FakeVllm
from tests.trainer.weight_sync.publications import WEIGHTS, FakeServer, at_call, broken, runs, serving, urls_of
from tests.trainer.weight_sync.sglang_server import FakeSglang
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.states import Edge


@pytest.fixture(params=[FakeVllm, FakeSglang])
def servers(request: pytest.FixtureRequest) -> Iterator[list[FakeServer]]:
    with serving(request.param(), request.param()) as fakes:
        yield fakes


def test_every_server_gets_the_weights_and_says_so(servers: list[FakeServer], publisher: WeightPublisher) -> None:
    result = publisher.publish(7, WEIGHTS.items())

    assert [(server.server, server.weight_version) for server in result.servers] == [(s.url, "7") for s in servers]
    assert result.failed == ()
    assert all(runs(fake, "7") for fake in servers)


def test_one_group_serves_many_publications(servers: list[FakeServer], publisher: WeightPublisher) -> None:
    publisher.attach()
    for version in (1, 2, 3):
        publisher.publish(version, WEIGHTS.items())

    assert all(fake.calls.count(fake.JOIN) == 1 for fake in servers)
    assert all(runs(fake, "3") for fake in servers)


def test_an_iterator_survives_a_second_attempt(servers: list[FakeServer], publisher: WeightPublisher) -> None:
    servers[1].faults[servers[1].UPDATE] = at_call(2, broken)

    result = publisher.publish(1, iter(WEIGHTS.items()))

    assert servers[1].calls.count(servers[1].PAUSE) == 2
    assert result.failed == ()
    assert all(runs(fake, "1") for fake in servers)


def test_a_server_that_is_not_there_is_named_and_the_other_is_served(
    servers: list[FakeServer], publisher: WeightPublisher
) -> None:
    servers[1].die()

    result = publisher.publish(1, WEIGHTS.items())

    assert [(failed.server, failed.error.edge) for failed in result.failed if failed.error] == [
        (servers[1].url, Edge.ATTACH)
    ]
    assert runs(servers[0], "1")


@pytest.mark.timeout(120)  # each of two attempts ends with its deadline; without one, gloo waits for half an hour
def test_a_server_that_dies_half_way_is_named_and_the_other_is_served(
    servers: list[FakeServer], publisher: WeightPublisher
) -> None:
    publisher.attach()
    servers[1].faults[servers[1].UPDATE] = at_call(2, servers[1].die)

    result = publisher.publish(1, WEIGHTS.items())

    assert [failed.server for failed in result.failed] == [servers[1].url]
    assert runs(servers[0], "1")


def test_a_server_restarted_before_the_first_publication_is_served(
    servers: list[FakeServer], publisher: WeightPublisher
) -> None:
    publisher.attach()
    servers[1].restart()  # reports "default", as it did when we met it

    result = publisher.publish(1, WEIGHTS.items())

    assert result.failed == ()
    assert all(runs(fake, "1") for fake in servers)


def test_a_server_restarted_between_two_publications_is_served_again(
    servers: list[FakeServer], publisher: WeightPublisher
) -> None:
    publisher.publish(1, WEIGHTS.items())
    servers[1].restart()

    result = publisher.publish(2, WEIGHTS.items())

    assert result.failed == ()
    assert all(runs(fake, "2") for fake in servers)
    assert servers[0].calls.count(servers[0].PAUSE) == 2  # noticed beforehand: no attempt was wasted


def test_ensure_current_sends_to_the_restarted_server_only(
    servers: list[FakeServer], publisher: WeightPublisher
) -> None:
    publisher.publish(1, WEIGHTS.items())
    servers[1].restart()
    pauses = servers[0].calls.count(servers[0].PAUSE)

    result = publisher.ensure_current(1, WEIGHTS.items())

    assert [server.weight_version for server in result.servers] == ["1", "1"]
    assert runs(servers[1], "1")
    assert servers[0].calls.count(servers[0].PAUSE) == pauses


def test_a_new_trainer_takes_over_from_one_that_vanished_half_way(
    servers: list[FakeServer], connected: Callable[..., WeightPublisher]
) -> None:
    first = connected(urls_of(servers))
    first.publish(1, WEIGHTS.items())
    for fake in servers:
        fake.is_paused = fake.is_updating = True
    second = connected(urls_of(servers))

    second.attach()
    assert not any(fake.is_paused for fake in servers)
    result = second.publish(2, WEIGHTS.items())

    assert result.failed == ()
    assert all(runs(fake, "2") for fake in servers)


def test_an_error_of_the_trainer_itself_passes_through_and_the_servers_are_resumed(
    servers: list[FakeServer], publisher: WeightPublisher
) -> None:
    class Failing:
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield from list(WEIGHTS.items())[:4]
            raise MemoryError("no room to gather")

    with pytest.raises(MemoryError):
        publisher.publish(1, Failing())

    assert not any(fake.is_paused for fake in servers)
    assert publisher.publish(2, WEIGHTS.items()).failed == ()
    assert all(runs(fake, "2") for fake in servers)
