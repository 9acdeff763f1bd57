"""Wait until a server answers."""

from __future__ import annotations

import asyncio
import time

import httpx

from atroposlib.errors import AtroposError


async def until_it_answers(url: str, name: str, *, timeout_s: float = 10.0) -> None:
    """Return when GET url answers 200.

    Raises:
        AtroposError: not within timeout_s.
    """
    deadline = time.monotonic() + timeout_s
    problem = "no answer"
    async with httpx.AsyncClient(trust_env=False, timeout=2.0) as http:
        while time.monotonic() < deadline:
            try:
                response = await http.get(url)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if response.status_code == httpx.codes.OK:
                    return
                problem = f"HTTP {response.status_code}"
            await asyncio.sleep(0.1)
    raise AtroposError(f"{name}: {url} did not answer within {timeout_s:.0f} s ({problem})")
