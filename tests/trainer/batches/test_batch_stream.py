"""Leasing ahead, waiting, confirming: against a FAKE rollout server in memory, and a FAKE one over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from atroposlib.client import RolloutClient
from atroposlib.errors import ConfigError, FencedError, NoBatchError, StepError
from atroposlib.wire.columns import encode_group
from atroposlib.wire.models import RunInfo, RunRequest
from tests.trainer.fakes import FakeRolloutServer, random_groups
from trainer.batches import stream as batch_stream
from trainer.batches.stream import BatchStream

REQUEST = RunRequest(run_name="r", batch_size=8, num_steps=3)


@contextmanager
def a_stream(server: FakeRolloutServer, **options: Any) -> Iterator[BatchStream]:
    stream = BatchStream(server.client, **{"last_step": 3, "deadline_s": 20.0, **options})
    try:
        stream.open_run(REQUEST)
        yield stream
    finally:
        stream.close()


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_client_that_cannot_be_made_leaves_no_thread() -> None:
    def connect() -> Any:
        raise ConfigError("rollout_server_url is no address")

    with pytest.raises(ConfigError, match="no address"):
        BatchStream(connect, last_step=3)

    assert "batch-stream" not in [thread.name for thread in threading.enumerate()]


def test_batches_come_in_order_and_each_is_leased_once() -> None:
    server = FakeRolloutServer()

    with a_stream(server) as stream:
        batches = [stream.get(step) for step in range(3)]

    assert [(batch or [])[0].group_id for batch in batches] == [f"step{s}-group0" for s in range(3)]
    assert server.said("lease") == [("lease", 0), ("lease", 1), ("lease", 2)]


def test_the_next_batch_is_leased_while_this_one_trains() -> None:
    server = FakeRolloutServer()

    with a_stream(server) as stream:
        stream.get(0)

        assert eventually(lambda: ("lease", 1) in server.events)
        assert ("lease", 2) not in server.events


def test_nothing_is_leased_beyond_the_last_step() -> None:
    server = FakeRolloutServer()

    with a_stream(server) as stream:
        stream.get(2)

    assert server.said("lease") == [("lease", 2)]


def test_without_prefetch_a_batch_is_leased_when_it_is_asked_for() -> None:
    server = FakeRolloutServer()

    with a_stream(server, prefetch=0) as stream:
        stream.get(0)
        time.sleep(0.2)

    assert server.said("lease") == [("lease", 0)]


def test_the_server_hears_that_the_trainer_lives_while_a_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_stream, "RENEW_PERIOD_S", 0.05)
    server = FakeRolloutServer()

    with a_stream(server) as stream:
        stream.get(0)
        time.sleep(0.3)

    assert len(server.said("renew")) >= 2


def test_after_the_deadline_the_error_says_what_the_server_waits_for() -> None:
    server = FakeRolloutServer(waits_until=lambda step: False)

    with (
        a_stream(server, deadline_s=0.3) as stream,
        pytest.raises(NoBatchError, match="no batch for step 0 within 0 s: no environment is registered"),
    ):
        stream.get(0)


def test_the_deadline_starts_when_the_batch_is_asked_for() -> None:
    ready = threading.Event()
    server = FakeRolloutServer(waits_until=lambda step: step == 0 or ready.is_set())

    with a_stream(server, deadline_s=0.5) as stream:
        stream.get(0)
        time.sleep(1.0)  # a long step: the lease ahead has waited longer than the deadline
        threading.Timer(0.2, ready.set).start()

        assert stream.get(1) is not None


def test_while_waiting_the_idle_hook_is_called_on_the_callers_thread() -> None:
    idle: list[threading.Thread] = []
    server = FakeRolloutServer(waits_until=lambda step: len(idle) >= 3)

    with a_stream(server) as stream:
        stream.get(0, on_idle=lambda: idle.append(threading.current_thread()))

    assert set(idle) == {threading.current_thread()}


def test_a_request_to_stop_ends_the_wait() -> None:
    server = FakeRolloutServer(waits_until=lambda step: False)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()

    with a_stream(server, should_stop=stop.is_set) as stream:
        assert stream.get(0) is None


def test_a_trainer_that_was_replaced_is_told_so() -> None:
    server = FakeRolloutServer()

    with a_stream(server) as stream:
        server.session += 1

        with pytest.raises(FencedError, match="took the run over"):
            stream.get(0)


def test_confirmations_carry_step_and_version() -> None:
    server = FakeRolloutServer()

    with a_stream(server) as stream:
        stream.publish_policy(0)
        stream.ack(0, policy_version=1)
        stream.ack(1, policy_version=None)
        stream.commit(2)

    assert server.events[1:] == [("policy", 0), ("ack", 0, 1), ("ack", 1, None), ("commit", 2)]


def test_close_gives_up_a_lease_under_way() -> None:
    server = FakeRolloutServer(waits_until=lambda step: step == 0)
    start = time.monotonic()

    with a_stream(server) as stream:
        stream.get(0)

    assert time.monotonic() - start < 5.0


@contextmanager
def fake_http_server(answers: Callable[[int], Response]) -> Iterator[str]:
    """A FAKE rollout server over HTTP: it knows one run and leases what `answers` says."""
    app = FastAPI()

    @app.post("/v1/run")
    async def open_run(request: Request) -> dict[str, Any]:
        body = RunRequest.model_validate_json(await request.body())
        info = RunInfo(
            run_id="run-id",
            run_name=body.run_name,
            session=5,
            policy_version=-1,
            committed_step=0,
            acknowledged_step=0,
            request=body,
        )
        return info.model_dump()

    @app.post("/v1/batches/{step}/lease")
    async def lease(step: int) -> Response:
        return answers(step)

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def a_batch(step: int) -> Response:
    body = b"".join(encode_group(group) for group in random_groups(step, sequences=8))
    return Response(body, media_type="application/vnd.atropos.groups")


def test_over_http_a_batch_arrives_as_it_was_sent() -> None:
    with fake_http_server(a_batch) as url:
        stream = BatchStream(lambda: RolloutClient(url), last_step=3)
        assert stream.open_run(REQUEST).session == 5
        groups = stream.get(1)
        stream.close()

    assert groups is not None
    assert [group.group_id for group in groups] == [group.group_id for group in random_groups(1, sequences=8)]


def test_over_http_the_servers_error_is_raised_here() -> None:
    def refuse(step: int) -> Response:
        return JSONResponse({"code": "step", "detail": f"step {step} is gone"}, status_code=409)

    with fake_http_server(refuse) as url:
        stream = BatchStream(lambda: RolloutClient(url), last_step=3)
        stream.open_run(REQUEST)
        with pytest.raises(StepError, match="step 1 is gone"):
            stream.get(1)
        stream.close()


def test_a_server_that_comes_late_is_waited_for(tmp_path: Any) -> None:
    calls: list[int] = []

    def first_busy(step: int) -> Response:
        calls.append(step)
        return a_batch(step) if len(calls) > 2 else JSONResponse({"code": "x", "detail": "restarting"}, status_code=503)

    with fake_http_server(first_busy) as url:
        stream = BatchStream(lambda: RolloutClient(url, deadline_s=0.1), last_step=1)
        stream.open_run(REQUEST)
        assert stream.get(0) is not None
        stream.close()

    assert len(calls) == 3
