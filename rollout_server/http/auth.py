"""Who may call what: bearer tokens with roles, and one table that says which role each route needs."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.routing import compile_path

from atroposlib.errors import AtroposError, ForbiddenError, MisdirectedError, UnauthenticatedError
from rollout_server.config import Role, ServerConfig

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Access(Enum):
    """What a route asks of its caller, where the server has tokens. A token of role admin opens everything."""

    PUBLIC = "public"
    ANY = "any role"
    ENV = "env"
    TRAINER = "trainer"
    ADMIN = "admin"

    def allows(self, role: Role) -> bool:
        """Whether a token of this role passes."""
        return role == "admin" or self in (Access.PUBLIC, Access.ANY) or self.value == role


ROUTES: Mapping[tuple[str, str], Access] = {
    ("GET", "/"): Access.PUBLIC,
    ("GET", "/healthz"): Access.PUBLIC,
    ("GET", "/readyz"): Access.PUBLIC,
    ("GET", "/metrics"): Access.ANY,
    ("GET", "/openapi.json"): Access.ANY,
    # native
    ("POST", "/v1/run"): Access.TRAINER,
    ("GET", "/v1/run"): Access.ANY,
    ("POST", "/v1/run/renew"): Access.TRAINER,
    ("POST", "/v1/envs"): Access.ENV,
    ("POST", "/v1/tickets"): Access.ENV,
    ("POST", "/v1/tickets/renew"): Access.ENV,
    ("POST", "/v1/tickets/return"): Access.ENV,
    ("POST", "/v1/groups"): Access.ENV,
    ("GET", "/v1/groups"): Access.ANY,
    ("POST", "/v1/batches/{step}/lease"): Access.TRAINER,
    ("POST", "/v1/batches/{step}/ack"): Access.TRAINER,
    ("POST", "/v1/batches/{step}/nack"): Access.TRAINER,
    ("POST", "/v1/commit"): Access.TRAINER,
    ("POST", "/v1/policy"): Access.TRAINER,
    ("POST", "/v1/servers"): Access.TRAINER,
    ("POST", "/v1/servers/leave"): Access.TRAINER,
    ("GET", "/v1/servers"): Access.ANY,
    ("GET", "/v1/status"): Access.ANY,
    ("GET", "/v1/events"): Access.ANY,
    ("GET", "/v1/doctor"): Access.ANY,
    # as old clients know them
    ("POST", "/register"): Access.TRAINER,
    ("GET", "/batch"): Access.TRAINER,
    ("GET", "/reset_data"): Access.TRAINER,
    ("POST", "/reset_data"): Access.TRAINER,
    ("POST", "/register-env"): Access.ENV,
    ("POST", "/disconnect-env"): Access.ENV,
    ("POST", "/scored_data"): Access.ENV,
    ("POST", "/scored_data_list"): Access.ENV,
    ("GET", "/status-env"): Access.ENV,
    ("POST", "/status-env"): Access.ENV,
    ("GET", "/wandb_info"): Access.ANY,
    ("GET", "/info"): Access.ANY,
    ("GET", "/status"): Access.ANY,
    ("GET", "/latest_example"): Access.ANY,
}  # fmt: skip
"""Every route. One that is missing here is open to admin alone."""


@dataclass(frozen=True)
class Match:
    """The route behind a path."""

    template: str
    access: Access


NO_ROUTE = Match("other", Access.ADMIN)


class RouteTable:
    """Finds the route of a request; paths without parameters by one look-up."""

    def __init__(self, routes: Mapping[tuple[str, str], Access] = ROUTES) -> None:
        self._fixed = {key: Match(key[1], access) for key, access in routes.items() if "{" not in key[1]}
        self._patterns: Sequence[tuple[str, re.Pattern[str], Match]] = [
            (method, compile_path(template)[0], Match(template, access))
            for (method, template), access in routes.items()
            if "{" in template
        ]

    def match(self, method: str, path: str) -> Match:
        """The route, or NO_ROUTE."""
        fixed = self._fixed.get((method, path))
        if fixed is not None:
            return fixed
        return next(
            (match for m, pattern, match in self._patterns if m == method and pattern.match(path)),
            NO_ROUTE,
        )


class TokenBook:
    """The known tokens, as digests.

    Args:
        tokens: by role.
    """

    def __init__(self, tokens: Mapping[Role, Sequence[SecretStr]]) -> None:
        self._digests: list[tuple[Role, bytes]] = [
            (role, _digest(token.get_secret_value())) for role, known in tokens.items() for token in known
        ]

    def role_of(self, token: str) -> Role | None:
        """The role of a token; takes the same time whichever token it resembles."""
        given, found = _digest(token), None
        for role, digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = role
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """Decides whether a request may pass.

    Args:
        config: tokens, host, insecure and cors_origins of the server.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._book = TokenBook(config.tokens)
        self._has_tokens = config.has_tokens
        self._guards_loopback = config.is_loopback and not config.has_tokens and not config.insecure
        self._origins = frozenset(config.cors_origins)

    def refusal(self, match: Match, headers: Headers) -> AtroposError | None:
        """Why the request may not pass; None when it may."""
        if self._has_tokens:
            return self._token_refusal(match, headers.get("authorization", ""))
        return self._page_refusal(match, headers) if self._guards_loopback else None

    def _token_refusal(self, match: Match, authorization: str) -> AtroposError | None:
        if match.access is Access.PUBLIC:
            return None
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return UnauthenticatedError("this server asks for a token; send the header Authorization: Bearer TOKEN")
        role = self._book.role_of(token.strip())
        if role is None:
            return UnauthenticatedError("the bearer token is not known here; ask the operator for a current one")
        if not match.access.allows(role):
            needed = match.access.value if match.access is Access.ADMIN else f"{match.access.value} or admin"
            return ForbiddenError(f"the token has role {role}; this route needs role {needed}")
        return None

    def _page_refusal(self, match: Match, headers: Headers) -> AtroposError | None:
        """On an open loopback port the danger is a web page in the user's own browser."""
        host = headers.get("host")
        if host is not None and host_name(host) not in LOOPBACK_NAMES:
            return MisdirectedError(
                f"Host {host[:80]!r} is no loopback name; without tokens this server answers to localhost, 127.0.0.1"
                " and [::1] only: use one of them, or start it with --token-file"
            )
        if match.access is not Access.PUBLIC and self._is_foreign_page(headers):
            origin = headers.get("origin", "another site")
            return ForbiddenError(
                f"the request comes from a web page of {origin[:80]}; add the page's origin to cors_origins if it may call"
            )
        return None

    def _is_foreign_page(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is not None:
            return origin not in self._origins and (urlsplit(origin).hostname or "") not in LOOPBACK_NAMES
        return headers.get("sec-fetch-site") in ("cross-site", "same-site")


def host_name(host: str) -> str:
    """The name in a Host header, lower case, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
