"""Batches for trainers that cannot acknowledge: each is offered until it was sent whole and the next one was asked for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from rollout_server.compat import handover
from rollout_server.config import ServerConfig
from tests.compat.old_bodies import ENV, REGISTRATION, numbers, old_group
from tests.processes import RolloutServerProcess, rollout_server_on_a_thread

WIDTH = 200_000
"""Tokens of a sequence: a batch of them fits in no socket buffer."""
SOCKET_TIMEOUT_S = 10.0


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with (
        rollout_server_on_a_thread(ServerConfig(port=0, store="memory")) as url,
        httpx.Client(base_url=url, timeout=20.0) as http,
    ):
        yield http


def wide_group(number: float) -> dict[str, Any]:
    tokens = list(range(100_000, 100_000 + WIDTH))
    return {"tokens": [tokens] * 2, "masks": [tokens] * 2, "scores": [number, 0.0], "env_id": 0}


def register(http: httpx.Client, **changes: Any) -> None:
    http.post("/register", json=REGISTRATION | {"num_steps": 1000, "max_token_len": WIDTH} | changes).raise_for_status()


def post(http: httpx.Client, *groups: dict[str, Any]) -> None:
    http.post("/scored_data_list", json=list(groups)).raise_for_status()


def next_numbers(http: httpx.Client) -> list[float]:
    return numbers(http.get("/batch").raise_for_status().json()["batch"])


@contextmanager
def half_a_batch(http: httpx.Client) -> Iterator[socket.socket]:
    """A connection on which the start of a batch was read, and no more."""
    address = urlsplit(str(http.base_url))
    assert address.hostname is not None
    with socket.socket() as connection:
        connection.settimeout(SOCKET_TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((address.hostname, address.port))
        connection.sendall(b"GET /batch HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while b'{"batch":[' not in received:
            received += connection.recv(1024)
        yield connection


def test_a_batch_of_which_only_half_arrived_is_offered_again(http: httpx.Client) -> None:
    register(http)
    post(http, wide_group(1.0), wide_group(2.0), old_group(3.0), old_group(4.0))

    with half_a_batch(http):
        pass

    assert next_numbers(http) == [1.0, 2.0]
    assert next_numbers(http) == [3.0, 4.0]


def test_while_a_client_stalls_others_are_told_that_there_is_nothing(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "TURN_WAIT_S", 0.1)
    register(http)
    post(http, wide_group(1.0), wide_group(2.0))

    with half_a_batch(http):
        assert http.get("/batch").json() == {"batch": None}

    monkeypatch.setattr(handover, "TURN_WAIT_S", 10.0)
    assert next_numbers(http) == [1.0, 2.0]


def test_a_client_that_takes_nothing_in_is_given_up(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SEND_WAIT_S", 1.0)
    register(http)
    post(http, wide_group(1.0), wide_group(2.0))

    with half_a_batch(http):
        # The stalled client is still connected; its turn is over all the same.
        monkeypatch.setattr(handover, "TURN_WAIT_S", 10.0)
        assert next_numbers(http) == [1.0, 2.0]


def test_registering_offers_the_last_batch_again(http: httpx.Client) -> None:
    register(http)
    post(http, *(old_group(float(i)) for i in range(4)))
    assert next_numbers(http) == [0.0, 1.0]

    register(http)

    assert next_numbers(http) == [0.0, 1.0]
    assert next_numbers(http) == [2.0, 3.0]
    assert http.get("/status").json()["current_step"] == 2


def test_registering_does_not_bring_back_what_was_acknowledged(http: httpx.Client) -> None:
    register(http)
    post(http, old_group(1.0), old_group(2.0))
    assert next_numbers(http) == [1.0, 2.0]
    assert next_numbers(http) == []

    register(http)

    assert next_numbers(http) == []


def test_another_run_does_not_count_the_last_batch_of_the_one_before_as_its_own(http: httpx.Client) -> None:
    register(http)
    post(http, old_group(1.0), old_group(2.0))
    assert next_numbers(http) == [1.0, 2.0]

    register(http, wandb_group="other")
    post(http, old_group(3.0), old_group(4.0))

    assert next_numbers(http) == [3.0, 4.0]


def test_many_callers_at_once_never_receive_the_same_batch(http: httpx.Client) -> None:
    register(http)
    post(http, *(old_group(float(i)) for i in range(80)))
    start = threading.Barrier(8)

    def take(_: int) -> list[list[float]]:
        with httpx.Client(base_url=http.base_url, timeout=20.0) as client:
            start.wait(SOCKET_TIMEOUT_S)
            return [next_numbers(client) for _ in range(5)]

    with ThreadPoolExecutor(8) as threads:
        batches = [batch for taken in threads.map(take, range(8)) for batch in taken]

    assert sorted(batches) == [[float(i), float(i + 1)] for i in range(0, 80, 2)]


def test_a_trainer_may_collect_batches_until_there_is_none(http: httpx.Client) -> None:
    register(http)
    post(http, *(old_group(float(i)) for i in range(5)))

    collected = list(iter(lambda: next_numbers(http), []))

    assert collected == [[0.0, 1.0], [2.0, 3.0]]


def test_a_killed_server_goes_on_where_it_was(rollout_server: RolloutServerProcess) -> None:
    with httpx.Client(base_url=rollout_server.url) as http:
        register(http)
        for _ in range(2):
            http.post("/register-env", json=ENV).raise_for_status()
        post(http, *(old_group(float(i)) for i in range(5)))
        assert [next_numbers(http) for _ in range(2)] == [[0.0, 1.0], [2.0, 3.0]]

    rollout_server.kill()
    rollout_server.start()

    with httpx.Client(base_url=rollout_server.url) as http:
        post(http, old_group(4.0), old_group(5.0))
        assert http.get("/status-env", params={"env_id": 1}).json()["queue_size"] == 2
        assert http.post("/register-env", json=ENV).json()["env_id"] == 2
        assert next_numbers(http) == [2.0, 3.0], "the batch in hand is offered again: nobody knows whether it arrived"
        assert next_numbers(http) == [4.0, 5.0], "the group that was sent again counts once"
