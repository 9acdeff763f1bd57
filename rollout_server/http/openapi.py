"""The OpenAPI description, made true: error answers of every route, and which token each one needs."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from atroposlib.wire.models import ErrorBody
from rollout_server.http.auth import Access, RouteTable

Responses = dict[int | str, dict[str, Any]]


class OldErrorBody(BaseModel):
    """Error answers of the old routes."""

    detail: Any


_MEANINGS = {
    400: "body cut short, or its content encoding broken",
    401: "token missing or not known",
    403: "the token's role may not do this",
    404: "no such thing",
    408: "the body came too slowly",
    409: "the run is in another state; the detail says which and what to do",
    413: "body too large",
    415: "content type not understood",
    421: "Host header names another machine",
    422: "a field is missing, unknown or out of range; the detail names it",
    429: "the server holds as much as it may; send again after Retry-After",
}


def error_responses(model: type[BaseModel] = ErrorBody) -> Responses:
    """What any route of a router may answer besides success."""
    return {status: {"model": model, "description": text} for status, text in _MEANINGS.items()}


def describe_security(app: FastAPI, table: RouteTable) -> None:
    """Make app.openapi() say which routes need a bearer token of which role."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        is_new = app.openapi_schema is None
        schema = describe()
        if is_new:
            _add_security(schema, app, table)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_security(schema: dict[str, Any], app: FastAPI, table: RouteTable) -> None:
    schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for route in app.routes:
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        for method in route.methods:
            access = table.match(method, route.path).access
            operation = schema["paths"][route.path_format][method.lower()]
            if access is not Access.PUBLIC:
                operation["security"] = [{"token": []}]
                operation["description"] = f"{operation.get('description', '')}\n\nRole: {access.value}".strip()
