"""JSON of the /v1 routes, parsed strictly: what two parsers could read in two ways is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from atroposlib.errors import BodyTooLargeError, ProtocolError
from rollout_server.config import ServerConfig
from rollout_server.http.limits import check_media_type, read_body

MAX_JSON_BYTES = 4 << 20
"""Control messages are small; groups travel as columns."""
INT64 = range(-(1 << 63), 1 << 63)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ProtocolError: not UTF-8, not JSON, a key given twice, NaN or Infinity, a number beyond 64 bits, nested too deeply.
    """
    if len(body) > MAX_JSON_BYTES:
        raise BodyTooLargeError(
            f"JSON body of {len(body)} bytes is over the {MAX_JSON_BYTES} bytes of a control message"
        )
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_int, parse_float=_float
        )
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"body is not UTF-8: byte {error.start} is {body[error.start]:#04x}; send UTF-8") from error
    except UnicodeEncodeError as error:
        raise ProtocolError("body holds half of a UTF-16 surrogate pair; send whole characters") from error
    except RecursionError as error:
        raise ProtocolError("body is nested too deeply; control messages are flat") from error
    except json.JSONDecodeError as error:
        raise ProtocolError(f"body is not JSON: {error.msg} at character {error.pos}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ProtocolError(f"field {twice[:80]!r} is given twice; give it once")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ProtocolError(f"{name} is not JSON; send a finite number or null")


def _int(digits: str) -> int:
    value = int(digits) if len(digits) < 25 else None
    if value is None or value not in INT64:
        raise ProtocolError(f"the number {digits[:40]} does not fit 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ProtocolError(f"the number {digits[:40]} is not finite as a 64-bit float")
    return value


class JsonRequest(Request):
    """A request whose JSON body came through our limits and parser."""

    async def prepare(self, config: ServerConfig) -> None:
        """Read and parse the body before FastAPI looks at it."""
        body = await read_body(self, config)
        if body:
            check_media_type(self, "application/json")
            self._json = parse_json(body)
        self._body = body


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed strictly; bodies of other kinds are left to the route."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind ours."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            strict = JsonRequest(request.scope, request.receive)
            if self.body_field is not None:
                await strict.prepare(strict.app.state.config)
            return await handle(strict)

        return handle_strictly
