"""The connection to an inference server: what it sends, and what failures become."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import aiohttp
import numpy as np
import pytest

from atroposlib.envs.server_handling.engines.http_client import (
    EngineHttp,
    HttpAnswer,
    is_infrastructure_failure,
    proxy_for,
)
from atroposlib.errors import ConfigError, ModelServerError, RolloutError
from tests.envs.engine_fakes import FakeEngine


def http(timeout_s: float = 5.0, api_key: str | None = None) -> EngineHttp:
    return EngineHttp("server s", api_key=api_key, timeout_s=timeout_s)


async def test_the_key_travels_as_a_bearer_token() -> None:
    async with FakeEngine({"POST /a": lambda body: (200, body)}) as engine:
        client = http(api_key="secret")
        answer = await client.post(f"http://127.0.0.1:{engine.port}/a", {"x": 1})
        await client.close()

    assert client.read(answer, "/a") == {"x": 1}
    assert engine.headers[0]["Authorization"] == "Bearer secret"


async def test_numpy_values_and_pydantic_messages_can_be_sent() -> None:
    from openai.types.chat import ChatCompletionMessage

    message = ChatCompletionMessage(role="assistant", content="hi")
    async with FakeEngine({"POST /a": lambda body: (200, body)}) as engine:
        client = http()
        await client.post(
            f"http://127.0.0.1:{engine.port}/a", {"ids": np.array([1, 2]), "t": np.float32(0.5), "m": [message]}
        )
        await client.close()

    assert engine.bodies("POST /a") == [{"ids": [1, 2], "t": 0.5, "m": [{"role": "assistant", "content": "hi"}]}]


async def test_connections_are_used_again_and_opened_again_after_close() -> None:
    async with FakeEngine({"GET /a": lambda body: (200, {})}) as engine:
        client, url = http(), f"http://127.0.0.1:{engine.port}/a"
        await client.get(url, timeout_s=5)
        session = client._session
        await client.get(url, timeout_s=5)
        assert client._session is session
        await client.close()
        assert (await client.get(url, timeout_s=5)).status == 200
        await client.close()


def test_a_client_outlives_the_event_loop_that_it_was_first_used_in() -> None:
    client = http()

    async def ask() -> int:
        async with FakeEngine({"GET /a": lambda body: (200, {})}) as engine:
            return (await client.get(f"http://127.0.0.1:{engine.port}/a", timeout_s=5)).status

    async def ask_and_close() -> int:
        status = await ask()
        await client.close()
        return status

    assert asyncio.run(ask()) == 200
    assert asyncio.run(ask_and_close()) == 200


async def test_nobody_at_the_other_end_is_a_failure_of_the_server() -> None:
    client = http()
    with pytest.raises(ModelServerError, match=r"server s: POST /x: .*127\.0\.0\.1"):
        await client.post("http://127.0.0.1:9/x", {})
    await client.close()


async def test_a_slow_answer_is_a_failure_of_the_server_that_names_the_limit() -> None:
    async def answer_late(body: Any) -> tuple[int, Any]:
        await asyncio.Event().wait()
        return 200, {}

    async with FakeEngine({"GET /a": answer_late}) as engine:
        client = http()
        with pytest.raises(ModelServerError, match=r"limit 0\.1 s"):
            await client.get(f"http://127.0.0.1:{engine.port}/a", timeout_s=0.1)
        await client.close()


async def test_no_more_file_descriptors_is_no_fault_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def request(self, *args: Any, **options: Any) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

    async def open_full(url: str) -> Full:
        return Full()

    client = http()
    monkeypatch.setattr(client, "_open_session", open_full)
    with pytest.raises(ConfigError, match="ulimit -n"):
        await client.post("http://127.0.0.1:9/x", {})


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RolloutError), (422, RolloutError), (401, ConfigError), (403, ConfigError), (404, ConfigError),
        (408, ModelServerError), (429, ModelServerError), (500, ModelServerError), (503, ModelServerError),
    ],
)  # fmt: skip
def test_a_status_says_who_is_to_blame(status: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"answered {status}: because") as raised:
        http().read(HttpAnswer(status, b"because"), "/r", fix="do this")
    assert type(raised.value) is error
    assert ("do this" in str(raised.value)) == (error is ConfigError)


def test_a_broken_body_is_a_failure_of_the_server() -> None:
    with pytest.raises(ModelServerError, match="unreadable"):
        http().read(HttpAnswer(200, b"{"), "/r")


def test_what_counts_as_infrastructure() -> None:
    class BadRequestError(Exception):
        status_code = 400

    class OverloadedError(Exception):
        status_code = 503

    assert is_infrastructure_failure(ConnectionResetError())
    assert is_infrastructure_failure(TimeoutError())
    assert is_infrastructure_failure(OverloadedError())
    assert is_infrastructure_failure(aiohttp.ServerDisconnectedError())
    assert not is_infrastructure_failure(BadRequestError())
    assert not is_infrastructure_failure(ValueError())
    # Our own errors have a status too: the one they travel as between our processes.
    assert not is_infrastructure_failure(RolloutError("refused"))


def test_the_proxy_of_the_environment_is_used_except_where_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")

    assert proxy_for("http://example.org/v1") == "http://proxy:3128"
    assert proxy_for("http://127.0.0.1:9001/v1") is None
