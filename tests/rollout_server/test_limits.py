"""What a request may cost, looked at from inside: bodies in flight, pace, inflation, strict JSON, connections."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from atroposlib.errors import (
    BodyEncodingError,
    BodyTimeoutError,
    BodyTooLargeError,
    GroupFormatError,
    OverloadedError,
    ProtocolError,
)
from atroposlib.wire.columns import encode_group, read_blobs
from rollout_server.config import ServerConfig
from rollout_server.group_limits import check_groups
from rollout_server.http import limits
from rollout_server.http.limits import Charge, InflightBytes, read_body
from rollout_server.http.strict_json import parse_json
from tests.builders import a_group
from tests.processes import rollout_server_on_a_thread

CONFIG = ServerConfig(max_body_bytes=4096, max_decompressed_bytes=8192, max_inflight_bytes=10_000, body_timeout_s=0.2)


def a_request(chunks: Sequence[bytes], *, inflight: InflightBytes | None = None, **headers: str) -> Request:
    """A request whose body comes in these chunks; None of them: it never comes."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if messages:
        messages[-1]["more_body"] = False
    waiting = iter(messages)

    async def receive() -> Any:
        message = next(waiting, None)
        return message if message is not None else await asyncio.Event().wait()

    scope = {
        "type": "http", "method": "POST", "path": "/",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "state": {"charge": Charge(inflight or InflightBytes(CONFIG.max_inflight_bytes))},
    }  # fmt: skip
    return Request(scope, receive)


async def test_a_body_arrives_whole_however_it_is_cut() -> None:
    assert await read_body(a_request([b"abc", b"", b"def"]), CONFIG) == b"abcdef"
    assert await read_body(a_request([b""]), CONFIG) == b""


async def test_a_body_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    assert len(await read_body(a_request([bytes(4096)]), CONFIG)) == 4096
    with pytest.raises(BodyTooLargeError, match="4097"):
        await read_body(a_request([bytes(4096), b"x"]), CONFIG)


async def test_a_stated_length_over_the_limit_is_refused_before_the_body_is_read() -> None:
    with pytest.raises(BodyTooLargeError, match="of 5000 bytes"):
        await read_body(a_request([], content_length="5000", expect="100-continue"), CONFIG)


@given(size=st.integers(0, 8192), cut=st.integers(1, 300), members=st.integers(1, 3))
async def test_gzip_is_undone_however_it_is_cut(size: int, cut: int, members: int) -> None:
    content = random.Random(size).randbytes(size // 8) * 4
    body = gzip.compress(content) + gzip.compress(b"") * (members - 1)
    chunks = [body[i : i + cut] for i in range(0, len(body), cut)]

    config = CONFIG.model_copy(update={"max_body_bytes": 1 << 20})
    assert await read_body(a_request(chunks, content_encoding="gzip"), config) == content


@pytest.mark.parametrize("size", [63, 64, 65, 128, 1000])
async def test_gzip_is_undone_in_steps(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INFLATE_STEP_BYTES", 64)
    body = gzip.compress(bytes(size))

    assert await read_body(a_request([body], content_encoding="gzip"), CONFIG) == bytes(size)


async def test_a_gzip_bomb_is_stopped_at_the_limit_not_after() -> None:
    inflight = InflightBytes(CONFIG.max_inflight_bytes)
    bomb = gzip.compress(bytes(3_000_000))

    with pytest.raises(BodyTooLargeError, match="max_decompressed_bytes=8192"):
        await read_body(a_request([bomb], inflight=inflight, content_encoding="gzip"), CONFIG)

    assert inflight.used <= CONFIG.max_decompressed_bytes


@pytest.mark.parametrize("cut", [1, 5, 10, 12, 20])
async def test_gzip_that_ends_early_is_an_error_wherever_it_ends(cut: int) -> None:
    body = gzip.compress(bytes(range(256)))

    with pytest.raises(BodyEncodingError, match="ends early"):
        await read_body(a_request([body[:-cut]], content_encoding="gzip"), CONFIG)


async def test_a_body_that_does_not_come_is_given_up() -> None:
    with pytest.raises(BodyTimeoutError, match=r"0 bytes .* body_timeout_s=0.2"):
        await read_body(a_request([]), CONFIG)


async def test_bodies_in_flight_share_one_budget_and_give_it_back() -> None:
    inflight = InflightBytes(6000)
    first, second = a_request([bytes(4000)], inflight=inflight), a_request([bytes(4000)], inflight=inflight)

    await read_body(first, CONFIG)
    with pytest.raises(OverloadedError, match=r"4000 bytes, 4000 more would pass max_inflight_bytes=6000"):
        await read_body(second, CONFIG)
    first.state.charge.release()
    second.state.charge.release()

    assert inflight.used == 0
    assert len(await read_body(a_request([bytes(4000)], inflight=inflight), CONFIG)) == 4000


async def test_a_stated_length_that_finds_no_room_is_refused_at_once() -> None:
    inflight = InflightBytes(6000)
    inflight.used = 5000

    with pytest.raises(OverloadedError):
        await read_body(a_request([], inflight=inflight, content_length="2000"), CONFIG)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is given twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e400}', "1e400"),
        (b'{"a": 9223372036854775808}', "64 bits"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "64 bits"),
        (b'{"a": "\xc3"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"a": "\\udc00"}', "surrogate"),
        (b"{'a': 1}", "not JSON"),
        (b"{} {}", "not JSON"),
        (b" " * (5 << 20), "4194304"),
    ],
)
def test_what_two_parsers_could_read_in_two_ways_is_refused(body: bytes, named: str) -> None:
    with pytest.raises(ProtocolError) as error:
        parse_json(body)

    assert named in str(error.value)
    assert len(str(error.value)) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(value=json_values)
def test_every_other_json_text_is_read_as_any_parser_reads_it(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_group_sequences": 1}, "2 sequences are over max_group_sequences=1"),
        ({"max_sequence_tokens": 6}, "7 tokens is over max_sequence_tokens=6"),
        ({"vocab_size": 14}, "'tokens' holds the id 14, expected ids below vocab_size=14"),
    ],
)
def test_a_group_over_a_limit_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    blobs = list(read_blobs(encode_group(a_group("one")) + encode_group(a_group("g"))))

    check_groups(blobs, ServerConfig(max_group_sequences=2, max_sequence_tokens=7, vocab_size=15))
    with pytest.raises(GroupFormatError, match="group 'one'") as error:
        check_groups(blobs, ServerConfig(**options))

    assert named in str(error.value)


def test_connections_over_the_limit_are_answered_503_and_closed(tmp_path: Path) -> None:
    config = ServerConfig(port=0, data_dir=tmp_path, synchronous="normal", max_connections=2)
    with rollout_server_on_a_thread(config) as url:
        address = urlsplit(url)
        target = (str(address.hostname), int(address.port or 0))
        with (
            socket.create_connection(target, timeout=10),
            socket.create_connection(target, timeout=10),
            socket.create_connection(target, timeout=10) as third,
        ):
            answer = third.recv(65536)

        assert answer.startswith(b"HTTP/1.1 503")
        assert b"max_connections=2" in answer
        assert b"retry-after" in answer
        assert httpx.get(f"{url}/healthz").status_code == 200


async def test_bodies_in_flight_are_given_back_when_requests_end(tmp_path: Path) -> None:
    config = ServerConfig(
        port=0, data_dir=tmp_path, synchronous="normal", max_body_bytes=4096, max_decompressed_bytes=4096,
        max_inflight_bytes=4096,
    )  # fmt: skip
    release = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(3000)
        await release.wait()

    with rollout_server_on_a_thread(config) as url:
        async with httpx.AsyncClient(base_url=url) as http, asyncio.TaskGroup() as tasks:
            first = tasks.create_task(http.post("/v1/groups", content=slow()))
            await _until(lambda: _gauge(url, "atropos_server_inflight_bytes") == 3000)
            busy = await http.post("/v1/groups", content=bytes(2000))
            release.set()
            await first
            after = await http.post("/v1/groups", content=bytes(2000))
            left = _gauge(url, "atropos_server_inflight_bytes")

    assert (busy.status_code, busy.headers["Retry-After"]) == (429, "1")
    assert "max_inflight_bytes=4096" in busy.json()["detail"]
    assert after.status_code == 422
    assert left == 0


def _gauge(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def _until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(is_true):  # noqa: ASYNC110 - the server runs on another thread
            await asyncio.sleep(0.02)
