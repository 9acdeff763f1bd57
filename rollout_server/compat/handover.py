"""GET /batch: at least once delivery to a trainer that cannot acknowledge.

Asking for the next batch acknowledges the one before, if that was sent whole. Otherwise it is offered again: to a trainer whose
connection broke, after POST /register, and after a restart of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from atroposlib.errors import FencedError, NoRunError, StepError
from atroposlib.wire.columns import decode_groups
from atroposlib.wire.json_codec import group_to_json_text
from atroposlib.wire.models import RunInfo
from rollout_server.compat.answering import Compression, accepts_gzip, work
from rollout_server.compat.runs import extend, is_legacy, run_or_none
from rollout_server.compat.state import HandedOut, LegacyState
from rollout_server.limits import read_body
from rollout_server.services import Services
from rollout_server.stores.base import Batch, Payload, Store

TURN_WAIT_S = 5.0
"""How long a caller waits for another one to receive its batch, before it is told that there is none now."""
SEND_WAIT_S = 30.0
"""A client that takes in nothing for this long is given up."""
PIECE_BYTES = 256 << 10
"""Payload that is written out as JSON and sent at a time."""


class BatchAnswer(Response):
    """Looks for the next batch, sends it, and notes whether it was sent whole.

    All of it happens while the answer is sent, because only then is it known what arrived.

    Args:
        services: of the application.
        is_gzip: whether the client takes compressed answers.
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
    pieces = cut(blobs)
    is_gzip, compression = accepts_gzip(request), Compression()
    try:
        for index, piece in enumerate(pieces):
            is_first, is_last = index == 0, index == len(pieces) - 1
            text = await work(_piece_size(piece), _write, piece, is_first, is_last, compression if is_gzip else None)
            async with asyncio.timeout(SEND_WAIT_S):
                if is_first:
                    await send(_start(is_gzip=is_gzip))
                await send({"type": "http.response.body", "body": text, "more_body": True})
        async with asyncio.timeout(SEND_WAIT_S):
            # An empty piece waits until most of what was sent has left.
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            if await request.is_disconnected():
                return False
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    except TimeoutError:
        return False
    return True
