"""What happens around every request: identity, counting, the bytes in flight, and the gate. Plain ASGI, no buffering."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.http.answers import error_response, refusal_response
from rollout_server.http.auth import Gate, RouteTable
from rollout_server.http.limits import Charge, InflightBytes
from rollout_server.logs import request_fields
from rollout_server.metrics import Metrics

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


@dataclass
class _Traffic:
    """What went through one request so far."""

    status: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


class RequestMiddleware:
    """Gives each request an id and its charge, counts it, and answers what nobody else caught.

    Args:
        app: what is inside.
        table: the routes, for their names.
        metrics: where requests are counted.
        inflight: what the charges draw on.
    """

    def __init__(self, app: ASGIApp, *, table: RouteTable, metrics: Metrics, inflight: InflightBytes) -> None:
        self._app = app
        self._table = table
        self._metrics = metrics
        self._inflight = inflight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        route = self._table.match(scope["method"], scope["path"]).template
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        charge = scope.setdefault("state", {})["charge"] = Charge(self._inflight)
        fields = request_fields.set({"request_id": request_id, "route": f"{method} {route}"})
        traffic, start = _Traffic(), time.perf_counter()
        with self._metrics.requests_in_flight.track_inprogress():
            try:
                await self._guarded(scope, _counting_receive(receive, traffic), _send(send, traffic, request_id))
            finally:
                charge.release()
                seconds = time.perf_counter() - start
                self._metrics.observe(
                    method, route, traffic.status,
                    seconds=seconds, received_bytes=traffic.received_bytes + charge.whole_bytes,
                    sent_bytes=traffic.sent_bytes,
                )  # fmt: skip
                log.debug("answered", extra={"status": traffic.status, "duration_s": round(seconds, 6)})
                request_fields.reset(fields)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An error that nobody expected is logged once, under the id that the caller is told."""
        is_started = False

        async def noting_send(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            log.exception("a request failed")
            if is_started:
                raise
            detail = f"the server failed; its log tells why under request_id={request_fields.get()['request_id']}"
            await error_response(500, "internal", detail, path=scope["path"])(scope, receive, send)


class GateMiddleware:
    """Lets pass whom the gate lets pass.

    Args:
        app: what is inside.
        table: the routes and what they ask for.
        gate: the decision.
    """

    def __init__(self, app: ASGIApp, *, table: RouteTable, gate: Gate) -> None:
        self._app = app
        self._table = table
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            refusal = self._gate.refusal(self._table.match(scope["method"], scope["path"]), Headers(scope=scope))
            if refusal is not None:
                await refusal_response(refusal, path=scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _request_id(given: str | None) -> str:
    return given if given is not None and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _counting_receive(receive: Receive, traffic: _Traffic) -> Receive:
    async def counting() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            traffic.received_bytes += len(message.get("body", b""))
        return message

    return counting


def _send(send: Send, traffic: _Traffic, request_id: str) -> Send:
    async def counting(message: Message) -> None:
        if message["type"] == "http.response.start":
            traffic.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = request_id
        elif message["type"] == "http.response.body":
            traffic.sent_bytes += len(message.get("body", b""))
        await send(message)

    return counting
