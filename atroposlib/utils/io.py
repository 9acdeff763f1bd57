"""Reads HTTP answers."""

from __future__ import annotations

import logging
from typing import Any

_log = logging.getLogger(__name__)


async def parse_http_response(resp: Any, logger: logging.Logger | None = None) -> Any:
    """The JSON body of an aiohttp answer.

    Raises:
        aiohttp.ClientResponseError: the status is 400 or more; the body is logged first.
        ValueError: the body is not JSON; it is logged first.
    """
    log = logger or _log
    # Read before the status is checked: raising releases the connection, and the body says what was wrong.
    text = await resp.text()
    try:
        resp.raise_for_status()
        return await resp.json()
    except Exception as error:
        log.error("unusable answer (%s), body: %s", error, text)
        raise
