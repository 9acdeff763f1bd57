"""Large bodies over real sockets: whole however they arrive, and the connection goes on, or ends with a reason."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from atroposlib.wire.columns import Group, decode_groups, encode_group
from rollout_server.config import ServerConfig
from rollout_server.group_limits import GROUPS_MEDIA_TYPE
from rollout_server.http.limits import WHOLE_BODY_BYTES
from tests.processes import rollout_server_on_a_thread

TIMEOUT_S = 10.0
TOKENS = 50_000
STATUS = b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServerConfig(
        port=0,
        data_dir=tmp_path_factory.mktemp("data"),
        max_body_bytes=2 << 20,
        max_decompressed_bytes=2 << 20,
        max_inflight_bytes=2 << 20,
        body_timeout_s=0.5,
    )
    with rollout_server_on_a_thread(config) as url:
        httpx.post(f"{url}/v1/run", json={"run_name": "run", "batch_size": 1, "num_steps": 100, "max_staleness": 100})
        httpx.post(f"{url}/v1/envs", json={"name": "env", "group_size": 1, "max_token_len": TOKENS})
        yield url


def a_body(group_id: str) -> bytes:
    """One group of half a megabyte."""
    tokens = np.arange(TOKENS, dtype=np.int32)
    return encode_group(
        Group(
            group_id=group_id,
            env_id=0,
            tokens=tokens,
            cu_seqlens=np.array([0, TOKENS], dtype=np.int32),
            loss_mask=np.ones(TOKENS, dtype=np.uint8),
            inference_logprobs=-tokens.astype(np.float32),
            policy_versions=np.array([[-1, TOKENS]], dtype=np.int32),
            scores=np.array([1.0]),
        )
    )


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


def wait_for_bytes_in_flight(url: str, is_wanted: Callable[[float], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_wanted(found := metric(url, "atropos_server_inflight_bytes ")):
        assert time.monotonic() < deadline, f"{found} bytes are in flight"
        time.sleep(0.01)


class Connection:
    """A socket that reads one answer at a time."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        self.socket = socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        status, _, body = self.whole_answer()
        return status, body

    def whole_answer(self) -> tuple[int, bytes, bytes]:
        """Status, headers in small letters and body of the next answer."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        headers, _, self._received = self._received.partition(b"\r\n\r\n")
        length = int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(self._received) < length:
            self._receive()
        body, self._received = self._received[:length], self._received[length:]
        return int(headers.split()[1]), headers.lower(), body

    def _receive(self) -> None:
        data = self.socket.recv(1 << 16)
        assert data, "the connection closed"
        self._received += data


def head(size: int, *lines: str) -> bytes:
    return "\r\n".join(
        [
            "POST /v1/groups HTTP/1.1", "Host: localhost", f"Content-Type: {GROUPS_MEDIA_TYPE}",
            f"Content-Length: {size}", *lines, "", "",
        ]
    ).encode()  # fmt: skip


def trained(url: str, step: int) -> bytes:
    """The batch of a step, as bytes."""
    session = httpx.post(
        f"{url}/v1/run", json={"run_name": "run", "batch_size": 1, "num_steps": 100, "max_staleness": 100}
    ).json()["session"]
    return httpx.post(f"{url}/v1/batches/{step}/lease", json={"session": session, "wait_s": 0}).content


@pytest.mark.parametrize("pieces", [1, 2, 7, 300])
def test_a_body_arrives_whole_in_any_number_of_pieces_and_the_connection_goes_on(url: str, pieces: int) -> None:
    body = a_body(f"pieces-{pieces}")
    assert len(body) > WHOLE_BODY_BYTES
    request = head(len(body)) + body
    size = -(-len(request) // pieces)
    with Connection(url) as connection:
        for start in range(0, len(request), size):
            connection.send(request[start : start + size])
            if start == 0 and pieces > 1:
                time.sleep(0.05)  # the route asks for the body while most of it is still to come
        status, text = connection.answer()
        connection.send(STATUS)
        again, _ = connection.answer()

    assert (status, again) == (200, 200)
    assert b'"accepted"' in text


def test_the_bytes_are_the_ones_that_were_sent(url: str) -> None:
    body = a_body("exact")
    httpx.post(f"{url}/v1/groups", content=body, headers={"Content-Type": GROUPS_MEDIA_TYPE})

    step, found = 0, b""
    while body not in found and step < 20:
        found = trained(url, step)
        step += 1

    assert found == body
    assert [group.group_id for group in decode_groups(found)] == ["exact"]


def test_requests_in_one_go_are_answered_in_turn(url: str) -> None:
    body = a_body("in-one-go")
    with Connection(url) as connection:
        connection.send(head(len(body)) + body + STATUS)
        first, text = connection.answer()
        second, _ = connection.answer()

    assert (first, second) == (200, 200)
    assert b'"accepted"' in text


def test_a_sender_that_waits_for_leave_gets_it(url: str) -> None:
    body = a_body("expect")
    with Connection(url) as connection:
        connection.send(head(len(body), "Expect: 100-continue"))
        assert connection.socket.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.send(body)
        status, _ = connection.answer()

    assert status == 200


def test_a_body_that_stops_is_a_408_that_counts_its_bytes_and_closes(url: str) -> None:
    body = a_body("stops")
    with Connection(url) as connection:
        connection.send(head(len(body)) + body[:100])
        status, text = connection.answer()
        rest = b""
        with suppress(ConnectionError):  # too late: swallowed, or refused by a closed socket, and no second answer
            connection.send(body[100:200])
            rest = connection.socket.recv(1000)

    assert status == 408
    assert b"100 bytes of the body" in text
    assert rest == b""


def test_bodies_beyond_the_bytes_in_flight_are_a_429_and_what_was_held_is_given_back(url: str) -> None:
    body = a_body("waits")
    pad = bytes((2 << 20) - len(body))
    with Connection(url) as slow, Connection(url) as other:
        slow.send(head(len(body + pad)) + body + pad[:-1])
        wait_for_bytes_in_flight(url, lambda n_bytes: n_bytes > 0)
        other.send(head(len(body)) + body)
        status, text = other.answer()

        assert status == 429
        assert b"max_inflight_bytes" in text

    wait_for_bytes_in_flight(url, lambda n_bytes: n_bytes == 0)
    late = httpx.post(f"{url}/v1/groups", content=a_body("late"), headers={"Content-Type": GROUPS_MEDIA_TYPE})
    assert late.status_code == 200


def test_a_body_that_will_not_fit_is_refused_before_it_comes_and_the_connection_goes_on(url: str) -> None:
    """Two bodies that have hardly begun, and pass the limit together."""
    size, begun = 3 << 19, bytes(1 << 17)
    with Connection(url) as first, Connection(url) as second:
        first.send(head(size) + begun)
        wait_for_bytes_in_flight(url, lambda n_bytes: n_bytes > 0)
        second.send(head(size) + begun)
        status, headers, _ = second.whole_answer()
        second.send(bytes(size - len(begun)) + STATUS)
        again, _ = second.answer()

    assert (status, again) == (429, 200)
    assert b"retry-after:" in headers
    wait_for_bytes_in_flight(url, lambda n_bytes: n_bytes == 0)


def test_a_request_that_ends_the_connection_may_be_followed_by_more(url: str) -> None:
    body = a_body("before-close")
    with Connection(url) as connection:
        connection.send(head(len(body)) + body[:-1])
        wait_for_bytes_in_flight(url, lambda n_bytes: n_bytes > 0)
        connection.send(body[-1:])
        first, _ = connection.answer()
        connection.send(STATUS.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + STATUS)
        second, _ = connection.answer()

    assert (first, second) == (200, 200)


def test_a_sender_that_goes_inside_a_body_leaves_nothing_behind(url: str) -> None:
    body = a_body("gone")
    before = httpx.get(f"{url}/v1/status").json()["queued_groups"]
    with Connection(url) as connection:
        connection.send(head(len(body)) + body[:-1])
        wait_for_bytes_in_flight(url, lambda n_bytes: n_bytes > 0)
    wait_for_bytes_in_flight(url, lambda n_bytes: n_bytes == 0)

    assert httpx.get(f"{url}/v1/status").json()["queued_groups"] == before
    again = httpx.post(f"{url}/v1/groups", content=body, headers={"Content-Type": GROUPS_MEDIA_TYPE})
    assert again.json()["results"][0]["status"] == "accepted"


def test_its_bytes_are_counted(url: str) -> None:
    def received() -> float:
        return metric(url, 'atropos_server_received_bytes_total{route="/v1/groups"} ')

    body, before = a_body("counted"), received()
    httpx.post(f"{url}/v1/groups", content=body, headers={"Content-Type": GROUPS_MEDIA_TYPE})

    assert received() - before == len(body)
