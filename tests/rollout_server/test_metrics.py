"""GET /metrics: stable names, the numbers of the status, and labels that callers cannot multiply."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from atroposlib.client import RolloutClient
from atroposlib.wire.models import EnvRequest, Status, TicketRequest
from rollout_server.config import ServerConfig
from rollout_server.http.limits import InflightBytes
from rollout_server.metrics import Metrics
from tests.builders import a_group, a_run
from tests.processes import rollout_server_on_a_thread

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with rollout_server_on_a_thread(ServerConfig(port=0, data_dir=tmp_path, synchronous="normal")) as url:
        yield url


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_documented_names_are_the_real_ones() -> None:
    documented = set(re.findall(r"`(atropos_server_\w+)`", OPERATING.read_text()))

    families = text_string_to_metric_families(Metrics(InflightBytes(1)).render(Status()).decode())
    real = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert real - documented == set(), "describe these in docs/operating.md"
    assert documented - real == set(), "docs/operating.md describes metrics that do not exist"


async def test_the_numbers_are_those_of_the_run(url: str) -> None:
    async with RolloutClient(url) as client:
        run = await client.open_run(a_run(batch_size=4, max_staleness=1))
        env = await client.register_env(EnvRequest(name="sums", group_size=2))
        await client.publish_policy(0, session=run.session)
        request = TicketRequest(env_id=env.env_id, session=env.session, sequences=2, count=3, wait_s=0)
        first, second, _third = (await client.request_tickets(request)).tickets
        groups = [a_group(ticket=first.ticket), a_group(ticket=second.ticket)]
        await client.post_groups(groups)
        await client.post_groups(groups[:1])
        await client.lease(0, session=run.session, deadline_s=5)
        await client.ack(0, session=run.session, policy_version=1)
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{url}/metrics")
    found = samples(answer.text)

    assert answer.headers["content-type"].startswith("text/plain")
    expected = {
        "step": 1, "steps_formed": 1, "steps_total": 100, "policy_version": 1, "max_staleness": 1, "batch_size": 4,
        "queue_groups": 0, "queue_sequences": 0, "queue_bytes": 0, "tickets_outstanding": 1,
    }  # fmt: skip
    assert {name: found[f"atropos_server_{name}", ()] for name in expected} == expected
    groups_by_status = {status: found["atropos_server_groups_total", (("status", status),)] for status in
                        ("accepted", "duplicate", "retired")}  # fmt: skip
    assert groups_by_status == {"accepted": 2, "duplicate": 1, "retired": 0}
    assert found["atropos_server_env_groups_accepted_total", (("env", "sums"),)] == 2
    assert found["atropos_server_env_tickets", (("env", "sums"),)] == 1
    assert found["atropos_server_trainer_last_seen_seconds", ()] >= 0
    posts = (("method", "POST"), ("route", "/v1/groups"), ("status", "200"))
    assert found["atropos_server_requests_total", posts] == 2
    assert found["atropos_server_received_bytes_total", (("route", "/v1/groups"),)] > 500
    lease = (("method", "POST"), ("route", "/v1/batches/{step}/lease"))
    assert found["atropos_server_request_seconds_count", lease] == 1


def test_callers_cannot_make_new_label_values(url: str) -> None:
    with httpx.Client(base_url=url) as http:
        for i in range(20):
            http.get(f"/v1/nothing/{i}")
            http.request(f"VERB{i}", "/v1/status")
            http.post(f"/v1/batches/{i}/lease", json={"session": 0, "wait_s": 0})
        found = samples(http.get("/metrics").text)

    routes = {dict(labels)["route"] for name, labels in found if name == "atropos_server_requests_total"}
    methods = {dict(labels)["method"] for name, labels in found if name == "atropos_server_requests_total"}
    assert routes <= {"other", "/v1/batches/{step}/lease", "/metrics", "/v1/status"}
    assert methods <= {"GET", "POST", "OTHER"}


def test_two_applications_count_apart() -> None:
    one, other = Metrics(InflightBytes(1)), Metrics(InflightBytes(1))

    one.observe("GET", "/", 200, seconds=0.1, received_bytes=0, sent_bytes=2)

    assert "atropos_server_requests_total{" in one.render(Status()).decode()
    assert "atropos_server_requests_total{" not in other.render(Status()).decode()
