"""The OpenAPI description tells the truth: schemathesis plays it against the real server.

The old routes are left out: they read their bodies by hand and are lax on purpose, so that old clients keep working.
The stream of events is left out because it does not end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

from rollout_server.app import create_app
from rollout_server.config import ServerConfig
from rollout_server.http.auth import ROUTES, Access
from tests.processes import rollout_server_on_a_thread

TOKEN = "admin-token-0000000"
AS_ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@schemathesis.serializer("application/vnd.atropos.groups")
def groups(ctx: schemathesis.SerializationContext, value: object) -> bytes:
    """Bytes as they are: what is generated is no group, and must be refused as such."""
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServerConfig.model_validate(
        {"port": 0, "data_dir": tmp_path_factory.mktemp("data"), "synchronous": "normal", "tokens": {"admin": [TOKEN]}}
    )
    with rollout_server_on_a_thread(config) as url:
        yield url


DESCRIPTION = schemathesis.openapi.from_dict(create_app(ServerConfig()).openapi())
FOUND = [cast("Ok[Any]", found).ok() for found in DESCRIPTION.get_all_operations()]
OPERATIONS = {
    operation.label: operation
    for operation in FOUND
    if operation.path.startswith(("/v1/", "/healthz", "/readyz", "/metrics")) and operation.path != "/v1/events"
}
PLAYS = [
    *((label, GenerationMode.POSITIVE) for label in OPERATIONS),
    # Only bodies are strict: a query parameter that nobody asked for is passed over, as everywhere on the web.
    *((label, GenerationMode.NEGATIVE) for label, operation in OPERATIONS.items() if operation.method == "post"),
]


def without_waiting(case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
    """A long-poll that may wait waits for nothing."""
    if isinstance(case.body, dict) and case.body.get("wait_s") in range(61):
        case.body = {**case.body, "wait_s": 0}
    return case


@pytest.mark.parametrize(("label", "mode"), PLAYS)
def test_the_server_answers_as_its_description_says(url: str, label: str, mode: GenerationMode) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(case=OPERATIONS[label].as_strategy(mode))
    def play(case: schemathesis.Case[Any]) -> None:
        answer = without_waiting(case).call(base_url=url, headers=AS_ADMIN)
        # What fits a schema may still name a run, step or session that is not there.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance], headers=AS_ADMIN)

    play()


def test_every_operation_describes_its_token_and_its_errors(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json", headers=AS_ADMIN).json()["paths"]

    for path, operations in paths.items():
        for method, operation in operations.items():
            is_public = ROUTES[method.upper(), path] is Access.PUBLIC
            assert ("security" in operation) != is_public, (method, path)
            if path.startswith("/v1/"):
                missing = {"401", "403", "408", "409", "413", "415", "422", "429"} - set(operation["responses"])
                assert missing == set(), (method, path)


def test_errors_of_v1_are_described_as_they_come(url: str) -> None:
    answers = httpx.get(f"{url}/openapi.json", headers=AS_ADMIN).json()["paths"]["/v1/run"]["post"]["responses"]

    kinds = {answers[status]["content"]["application/json"]["schema"]["$ref"] for status in ("401", "409", "422")}
    assert kinds == {"#/components/schemas/ErrorBody"}
