"""GET /batch: at least once delivery to a trainer that cannot acknowledge.

Asking for the next batch acknowledges the one before, if that was sent whole. Otherwise it is offered again: to a trainer whose
connection broke, after POST /register, and after a restart of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from atroposlib.errors import FencedError, NoRunError, StepError
from atroposlib.wire.models import RunInfo
from rollout_server.compat.answering import JSON, accepts_gzip
from rollout_server.compat.batch_pieces import BatchPieces
from rollout_server.compat.runs import extend, is_legacy, run_or_none
from rollout_server.compat.state import HandedOut, LegacyState
from rollout_server.http.limits import read_body
from rollout_server.services import Services
from rollout_server.stores.base import Batch, Payload, Store

TURN_WAIT_S = 5.0
"""How long a caller waits for another one to receive its batch, before it is told that there is none now."""
SEND_WAIT_S = 30.0
"""A client that takes in nothing for this long is given up."""


class BatchAnswer(Response):
    """Looks for the next batch, sends it, and notes whether it was sent whole.

    All of it happens while the answer is sent, because only then is it known what arrived.

    Args:
        services: of the application.
        request: the one to answer.
    """

    def __init__(self, services: Services, request: Request) -> None:
        super().__init__()
        self._services = services
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        state = self._services.legacy
        # With the body read, all that can still come is the news that the client is gone.
        await read_body(self._request, self._services.config)
        try:
            async with asyncio.timeout(TURN_WAIT_S):
                await state.turn.acquire()
        except TimeoutError:
            await JSONResponse({"batch": None})(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        finally:
            state.turn.release()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        store, state = self._services.store, self._services.legacy
        run = await run_or_none(store)
        if run is None or not is_legacy(run):
            await JSONResponse(_not_registered(run))(scope, receive, send)
            return
        try:
            found = await next_batch(store, state, run)
        except (FencedError, NoRunError, StepError):
            found = None  # somebody registered or reset in between: the next request sees the new state
        if found is None:
            await JSONResponse({"batch": None})(scope, receive, send)
            return
        handed_out, batch = found
        if await _send_whole(self._request, send, batch.blobs):
            state.handed_out = handed_out


def _not_registered(run: RunInfo | None) -> dict[str, object]:
    message = "Trainer not registered. Call /register first."
    if run is not None:
        message = f"Run {run.request.run_name!r} belongs to a trainer of the /v1 routes. {message}"
    return {"status": "error", "message": message, "batch": []}


async def next_batch(store: Store, state: LegacyState, run: RunInfo) -> tuple[HandedOut, Batch] | None:
    """Acknowledge the batch that was handed out last, and find the one to send now.

    Raises:
        FencedError, NoRunError, StepError: the run changed meanwhile.
    """
    step = run.acknowledged_step
    if state.handed_out == HandedOut(run.run_id, run.session, step):
        step += 1
        await store.ack(step - 1, run.session, step)
        await store.commit(step, run.session)
        run = await store.run_info()
    if step >= run.request.num_steps:
        if (await store.status()).queued_sequences < run.request.batch_size:
            return None
        run = await extend(store, run)
    batch = await store.lease(step, run.session)
    return (HandedOut(run.run_id, run.session, step), batch) if isinstance(batch, Batch) else None


async def _send_whole(request: Request, send: Send, blobs: Sequence[Payload]) -> bool:
    """Send a batch; False when the client was gone, or took in nothing, before the end of it was sent."""
    pieces, is_started = BatchPieces(blobs, may_compress=accepts_gzip(request)), False
    try:
        async for piece in pieces:
            if not is_started:
                await send(_start(is_compressed=pieces.is_compressed))
                is_started = True
            await _send_piece(send, piece)
        await _send_piece(send, b"")  # comes back when most of what was sent has left
        if await request.is_disconnected():
            return False
        await _send_piece(send, b"", has_more=False)
    except TimeoutError:
        return False
    return True


def _start(*, is_compressed: bool) -> Message:
    headers = [(b"content-type", JSON.encode())]
    if is_compressed:
        headers += [(b"content-encoding", b"gzip"), (b"vary", b"Accept-Encoding")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


async def _send_piece(send: Send, piece: bytes, *, has_more: bool = True) -> None:
    async with asyncio.timeout(SEND_WAIT_S):
        await send({"type": "http.response.body", "body": piece, "more_body": has_more})
