"""The least that an HTTP server can do with groups: bodies into a deque, the same bytes out. No checks, no state on disk."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

bodies: deque[bytes] = deque()


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """POST keeps a body, GET gives the oldest back, empty when there is none."""
    answer = b"ok"
    if scope["method"] == "POST":
        chunks, more = [], True
        while more:
            message = await receive()
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        bodies.append(b"".join(chunks))
    else:
        answer = bodies.popleft() if bodies else b""
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(answer)).encode())]}
    )
    await send({"type": "http.response.body", "body": answer})


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )
