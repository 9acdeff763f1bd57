"""Groups into a server's queue, with nobody taking them out."""

from __future__ import annotations

from contextlib import closing

from benchmarks.rollout_server.exchanges import Exchange


def fill(exchange: Exchange, port: int, *, groups: int) -> int:
    """Post whole requests until at least so many groups are queued; returns how many. The exchange must be open."""
    body, sent = exchange.payload.body(), 0
    with closing(exchange.poster(port)) as poster:
        while sent < groups:
            exchange.payload.stamp(body, sent)
            poster.post(body)
            sent += len(exchange.payload.groups)
    return sent
