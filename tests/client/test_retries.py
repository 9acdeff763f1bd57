"""What the rollout client tries again, how long it waits, and when it gives up."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from atroposlib.client import RolloutClient
from atroposlib.errors import AtroposError, ServerUnreachableError
from tests.processes import free_port


def a_client(*answers: httpx.Response, deadline_s: float = 5.0) -> RolloutClient:
    """A client whose server gives these answers in turn. MOCK transport."""
    client = RolloutClient("http://server", deadline_s=deadline_s)
    waiting = list(answers)
    client._http = httpx.AsyncClient(
        base_url="http://server", transport=httpx.MockTransport(lambda request: waiting.pop(0))
    )
    return client


@pytest.mark.parametrize("status", [408, 429, 500, 503])
@pytest.mark.parametrize("retry_after", ["0", "Wed, 21 Oct 2026 07:28:00 GMT", None])
async def test_a_busy_server_is_asked_again(status: int, retry_after: str | None) -> None:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    async with a_client(httpx.Response(status, headers=headers), httpx.Response(204)) as client:
        await client.renew_trainer(0)


async def test_what_the_server_refuses_is_not_asked_again() -> None:
    refusal = httpx.Response(422, json={"code": "protocol", "detail": "no such field"})
    async with a_client(refusal) as client:
        with pytest.raises(AtroposError, match="no such field"):
            await client.renew_trainer(0)


async def test_a_short_deadline_is_kept() -> None:
    async with RolloutClient(f"http://127.0.0.1:{free_port()}", deadline_s=0.2) as client:
        async with asyncio.timeout(10):  # far below the 30 s of a request
            with pytest.raises(ServerUnreachableError, match=r"within 0\.2 s"):
                await client.renew_trainer(0)
