"""How errors travel: ErrorBody on /v1, FastAPI's {"detail": ...} on the old routes."""

from __future__ import annotations

import logging

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from atroposlib.errors import AtroposError, BodyEncodingError
from atroposlib.wire.models import ErrorBody

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
QUOTED_CHARACTERS = 700
"""An error may quote what came in; of a long one the beginning and the end are sent back."""
_HEADERS = {
    401: {"WWW-Authenticate": 'Bearer realm="rollout server"'},
    # What is left of the body would be read as the next request, or would come for ever.
    408: {"Connection": "close"},
    413: {"Connection": "close"},
    429: {"Retry-After": str(RETRY_AFTER_S)},
}
_CODES = {404: "not_found", 405: "method_not_allowed"}


def is_native(path: str) -> bool:
    """Whether a path belongs to the /v1 routes."""
    return path.startswith("/v1/")


def error_response(status: int, code: str, detail: str, *, path: str) -> Response:
    """One error, in the form that callers of this path expect."""
    if len(detail) > 2 * QUOTED_CHARACTERS:
        detail = f"{detail[:QUOTED_CHARACTERS]} ... {detail[-QUOTED_CHARACTERS:]}"
    body = ErrorBody(code=code, detail=detail).model_dump() if is_native(path) else {"detail": detail}
    return JSONResponse(body, status_code=status, headers=_HEADERS.get(status))


def refusal_response(error: AtroposError, *, path: str) -> Response:
    """One of our own errors."""
    if isinstance(error, BodyEncodingError) and not is_native(path):
        return PlainTextResponse("Invalid gzip payload", status_code=error.status)  # as old servers say it
    return error_response(error.status, error.code, str(error), path=path)


async def answer_error(request: Request, error: Exception) -> Response:
    """Exception handler for AtroposError."""
    assert isinstance(error, AtroposError)
    return refusal_response(error, path=request.url.path)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Exception handler for unknown paths and methods."""
    assert isinstance(error, HTTPException)
    response = error_response(
        error.status_code, _CODES.get(error.status_code, "http"), str(error.detail), path=request.url.path
    )
    response.headers.update(error.headers or {})
    return response


async def answer_validation(request: Request, error: Exception) -> Response:
    """Exception handler for fields that do not fit their message: each is named, with its value and what is expected."""
    assert isinstance(error, RequestValidationError)
    if not is_native(request.url.path):
        return JSONResponse({"detail": [_as_fastapi(item) for item in error.errors()]}, status_code=422)
    detail = "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']} (got {str(item.get('input'))[:80]})"
        for item in error.errors()
    )
    return error_response(422, "protocol", detail, path=request.url.path)


def _as_fastapi(item: dict[str, object]) -> dict[str, object]:
    loc = item["loc"]
    assert isinstance(loc, tuple)
    return {"type": item["type"], "loc": list(loc), "msg": item["msg"], "input": _shortened(item.get("input"))}


def _shortened(value: object) -> object:
    """What came in, as it came; of a large one the beginning, as text."""
    is_small = value is None or isinstance(value, (bool, int, float)) or len(str(value)) <= QUOTED_CHARACTERS
    return value if is_small else str(value)[:QUOTED_CHARACTERS]
