"""Who may call what: tokens and roles, and what an open server on loopback still refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.routing import Route

from rollout_server.app import create_app
from rollout_server.config import ServerConfig
from rollout_server.http.auth import NO_ROUTE, ROUTES, Access, Gate, RouteTable, TokenBook, host_name
from tests.processes import rollout_server_on_a_thread

TOKENS = {"env": ["env-token-000000000"], "trainer": ["trainer-token-00000"], "admin": ["admin-token-0000000"]}


def with_tokens(**options: object) -> ServerConfig:
    return ServerConfig.model_validate({"port": 0, "synchronous": "normal", "tokens": TOKENS, **options})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with rollout_server_on_a_thread(with_tokens(data_dir=tmp_path_factory.mktemp("data"))) as url:
        yield url


def as_role(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[role][0]}"}


def test_every_route_of_the_application_stands_in_the_table_and_every_row_has_a_route(tmp_path: Path) -> None:
    app = create_app(ServerConfig(data_dir=tmp_path))

    routes = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, Route | APIRoute)
        for method in (route.methods or set()) - {"HEAD"}
    }

    assert routes - set(ROUTES) == set(), "say in auth.ROUTES who may call these"
    assert set(ROUTES) - routes == set(), "these rows of auth.ROUTES have no route"


def test_a_route_that_is_not_in_the_table_is_open_to_admin_alone() -> None:
    match = RouteTable().match("GET", "/v1/added-yesterday")

    assert match == NO_ROUTE
    assert [match.access.allows(role) for role in ("env", "trainer", "admin")] == [False, False, True]


@pytest.mark.parametrize("role", ["env", "trainer", "admin"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_each_role_reaches_what_the_table_says(role: str, method: str, path: str) -> None:
    gate, access = Gate(with_tokens()), ROUTES[method, path]

    refusal = gate.refusal(RouteTable().match(method, path.replace("{step}", "3")), Headers(as_role(role)))

    expected = role == "admin" or access in (Access.PUBLIC, Access.ANY) or access.value == role
    assert (refusal is None) == expected


def test_the_routes_that_change_a_run_each_need_the_role_that_owns_them() -> None:
    assert ROUTES["GET", "/reset_data"] is Access.TRAINER
    assert ROUTES["POST", "/v1/run"] is Access.TRAINER
    assert ROUTES["POST", "/v1/groups"] is Access.ENV
    assert {path for (_, path), access in ROUTES.items() if access is Access.PUBLIC} == {"/", "/healthz", "/readyz"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, 401),
        ({"Authorization": TOKENS["trainer"][0]}, 401),
        ({"Authorization": f"Bearer {TOKENS['trainer'][0][:-1]}"}, 401),
        ({"Authorization": f"Bearer {TOKENS['trainer'][0]}0"}, 401),
        ({"Authorization": "Bearer \xff\xfe"}, 401),
        (as_role("env"), 403),
        (as_role("trainer"), 409),  # let in; there is no run yet
        ({"Authorization": f"bearer  {TOKENS['admin'][0]}"}, 409),
    ],
)
def test_a_request_needs_a_known_token_of_the_right_role(url: str, headers: Mapping[str, str], status: int) -> None:
    body = {"session": 1, "policy_version": 0}

    answer = httpx.post(f"{url}/v1/policy", json=body, headers=httpx.Headers(headers, encoding="latin-1"))

    assert answer.status_code == status, answer.text
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert set(answer.json()) == {"code", "detail"}


def test_old_routes_answer_refusals_in_their_own_form(url: str) -> None:
    missing = httpx.get(f"{url}/reset_data")
    wrong = httpx.get(f"{url}/reset_data", headers=as_role("env"))

    assert (missing.status_code, set(missing.json())) == (401, {"detail"})
    assert (wrong.status_code, set(wrong.json())) == (403, {"detail"})
    assert "trainer" in wrong.json()["detail"]


def test_what_tells_whether_the_server_lives_needs_no_token(url: str) -> None:
    assert [httpx.get(f"{url}{path}").status_code for path in ("/", "/healthz", "/readyz")] == [200] * 3
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.get(f"{url}/metrics", headers=as_role("env")).status_code == 200


def test_an_unknown_path_tells_a_stranger_nothing(url: str) -> None:
    assert httpx.get(f"{url}/v1/nothing").status_code == 401
    assert httpx.get(f"{url}/v1/nothing", headers=as_role("admin")).status_code == 404


def test_a_token_is_compared_with_every_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr("rollout_server.http.auth.hmac.compare_digest", compare)
    book = TokenBook({"env": [SecretStr("first"), SecretStr("second")], "admin": [SecretStr("third")]})

    assert book.role_of("first") == "env"
    assert len(compared) == 3
    assert {len(digest) for digest in compared} == {32}, "digests: their comparison tells nothing of the length"


@pytest.fixture(scope="module")
def open_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServerConfig(
        port=0, synchronous="normal", data_dir=tmp_path_factory.mktemp("open"), cors_origins=("https://ui.example.org",)
    )
    with rollout_server_on_a_thread(config) as url:
        yield url


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200), ("[::1]", 200),
        ("evil.example.org", 421), ("localhost.evil.example.org:8000", 421), ("127.0.0.1.evil.org", 421), ("", 421),
    ],
)  # fmt: skip
def test_an_open_server_answers_to_loopback_names_only(open_url: str, host: str, status: int) -> None:
    answer = httpx.get(f"{open_url}/v1/status", headers={"Host": host})

    assert answer.status_code == status
    if status == 421:
        assert "--token-file" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://ui.example.org"}, 200),
    ],
)
def test_a_web_page_of_another_site_cannot_use_an_open_server(
    open_url: str, headers: dict[str, str], status: int
) -> None:
    assert httpx.get(f"{open_url}/v1/status", headers=headers).status_code == status


def test_cors_is_off_unless_an_origin_is_named(url: str, open_url: str) -> None:
    preflight = {"Origin": "https://ui.example.org", "Access-Control-Request-Method": "POST"}

    closed = httpx.options(f"{url}/v1/status", headers={**preflight, **as_role("admin")})
    named = httpx.options(f"{open_url}/v1/status", headers=preflight)
    other = httpx.options(f"{open_url}/v1/status", headers={**preflight, "Origin": "https://evil.example.org"})

    assert "access-control-allow-origin" not in closed.headers
    assert named.headers["access-control-allow-origin"] == "https://ui.example.org"
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "name"), [("a:1", "a"), ("A", "a"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("a.b:", "a.b"), ("", "")]
)
def test_the_name_in_a_host_header(host: str, name: str) -> None:
    assert host_name(host) == name
