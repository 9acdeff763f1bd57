"""Running the server: readiness, draining, TLS, log lines."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from rollout_server.app import create_app
from rollout_server.config import ServerConfig
from rollout_server.logs import JsonFormatter, TextFormatter, request_fields
from tests.processes import RolloutServerProcess, rollout_server_on_a_thread

RUN = {"run_name": "run", "batch_size": 4, "num_steps": 10}
WAIT_DEADLINE_S = 10.0


def until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_DEADLINE_S
    while not is_true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def requests_in_flight(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("atropos_server_requests_in_flight "))


@pytest.fixture
def draining(tmp_path: Path) -> Iterator[RolloutServerProcess]:
    server = RolloutServerProcess(tmp_path / "data", "--drain-delay-s", "1.5")
    server.start()
    yield server
    server.kill()


def test_a_server_with_a_working_store_is_ready(rollout_server: RolloutServerProcess) -> None:
    answer = httpx.get(f"{rollout_server.url}/readyz")

    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


async def test_a_server_whose_store_fails_is_up_but_not_ready_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> None:
        raise OSError("No space left on device")

    app = create_app(ServerConfig(data_dir=tmp_path, synchronous="normal"))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        with monkeypatch.context() as patched:
            patched.setattr(app.state.services.store, "status", broken)
            ready, healthy, status = await http.get("/readyz"), await http.get("/healthz"), await http.get("/v1/status")
        again = await http.get("/readyz")

    assert (ready.status_code, healthy.status_code, again.status_code) == (503, 200, 200)
    assert "No space left on device" in ready.json()["reason"]
    assert status.status_code == 500
    assert status.json()["code"] == "internal"
    assert status.headers["X-Request-Id"] in status.json()["detail"]
    assert "space" not in status.text, "what went wrong inside is for the log"


def test_sigterm_ends_long_polls_at_once_and_the_process_with_status_0(draining: RolloutServerProcess) -> None:
    with httpx.Client(base_url=draining.url, timeout=30) as http, ThreadPoolExecutor() as pool:
        session = http.post("/v1/run", json=RUN).json()["session"]
        env = http.post("/v1/envs", json={"name": "env", "group_size": 2}).json()
        ask = {"env_id": env["env_id"], "session": env["session"], "sequences": 2, "count": 1024, "wait_s": 0}
        http.post("/v1/tickets", json=ask)
        lease = pool.submit(http.post, "/v1/batches/0/lease", json={"session": session, "wait_s": 60})
        tickets = pool.submit(http.post, "/v1/tickets", json={**ask, "wait_s": 60})
        until(lambda: requests_in_flight(draining.url) == 3)

        os.kill(draining.pid, signal.SIGTERM)
        until(lambda: httpx.get(f"{draining.url}/readyz").status_code == 503)
        reason = httpx.get(f"{draining.url}/readyz").json()["reason"]
        late = httpx.post(f"{draining.url}/v1/batches/0/lease", json={"session": session, "wait_s": 60}, timeout=30)

    assert (lease.result().status_code, tickets.result().json()["tickets"]) == (202, [])
    assert late.status_code == 202
    assert "shutting down" in reason
    assert draining.wait() == 0


def test_a_request_under_way_finishes_while_the_server_drains(tmp_path: Path) -> None:
    server = RolloutServerProcess(tmp_path / "data")
    server.start()
    half, rest = json.dumps(RUN).encode()[:10], json.dumps(RUN).encode()[10:]
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_DEADLINE_S) as connection:
        head = f"POST /v1/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(half + rest)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + half)
        until(lambda: requests_in_flight(server.url) == 2)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.5)
        connection.sendall(rest)
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200")
    assert server.wait() == 0


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    server = RolloutServerProcess(tmp_path / "data", "--drain-delay-s", "600")
    server.start()

    os.kill(server.pid, signal.SIGTERM)
    until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
    os.kill(server.pid, signal.SIGTERM)

    assert server.wait() == -signal.SIGTERM


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_https_with_the_given_certificate(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    config = ServerConfig(
        port=0, data_dir=tmp_path / "data", synchronous="normal", ssl_certfile=certificate, ssl_keyfile=key
    )

    with rollout_server_on_a_thread(config) as url:
        context = ssl.create_default_context(cafile=certificate)
        answer = httpx.get(url.replace("http://", "https://") + "/v1/status", verify=context)

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("given", "is_kept"), [("abc-123", True), ("x" * 65, False), ("a b", False), ("a\tb", False), (None, False)]
)
def test_every_answer_names_its_request(rollout_server: RolloutServerProcess, given: str | None, is_kept: bool) -> None:
    headers = {} if given is None else {"X-Request-Id": given}

    named = httpx.get(f"{rollout_server.url}/v1/status", headers=headers).headers["X-Request-Id"]

    assert named
    assert (named == given) == is_kept


def a_record(text: str, **extra: object) -> logging.LogRecord:
    return logging.getLogger("test").makeRecord("test", logging.WARNING, "file", 1, text, (), None, extra=extra)


def test_a_json_line_carries_the_fields_that_are_known() -> None:
    fields = request_fields.set({"request_id": "r1", "route": "POST /v1/groups"})
    try:
        line = json.loads(JsonFormatter().format(a_record("two\nlines", step=3, group_id="g")))
    finally:
        request_fields.reset(fields)

    assert line["time"].endswith("+00:00")
    del line["time"]
    assert line == {
        "level": "warning", "logger": "test", "message": "two\nlines", "request_id": "r1",
        "route": "POST /v1/groups", "step": 3, "group_id": "g",
    }  # fmt: skip


def test_a_caller_cannot_start_a_log_line_of_its_own() -> None:
    assert "\n" not in TextFormatter().format(a_record("run 'x'\n12:00:00 error   forged"))
    assert "\n" not in JsonFormatter().format(a_record("run 'x'\n{}"))


def test_an_exception_is_part_of_the_json_line() -> None:
    record = a_record("it broke")
    try:
        raise ValueError("why")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)

    assert "ValueError: why" in json.loads(JsonFormatter().format(record))["exception"]


def test_requests_are_not_logged_unless_asked_for(tmp_path: Path) -> None:
    lines: dict[str, list[dict[str, object]]] = {}
    for level in ("info", "debug"):
        server = RolloutServerProcess(tmp_path / level, "--log-format", "json", "--log-level", level)
        server.start()
        httpx.get(f"{server.url}/v1/status", headers={"X-Request-Id": "mine"})
        server.stop()
        written = server.log.read_text().splitlines()
        lines[level] = [json.loads(line) for line in written if line.startswith("{")]

    assert lines["info"] == []
    answered = [line for line in lines["debug"] if line.get("request_id") == "mine"]
    assert [(line["message"], line["route"], line["status"]) for line in answered] == [
        ("answered", "GET /v1/status", 200)
    ]
