"""What a publication promises, against servers that speak vLLM's routes and receive over real gloo."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.weight_sync.fake_vllm import FakeVllm
from tests.trainer.weight_sync.publications import WEIGHTS, at_call, broken, runs, urls_of
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError, WeightSyncError
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.states import Deadlines, Edge, State, advance


def test_a_server_is_paused_before_it_is_sent_to_and_resumed_after_it_was_asked(
    servers: list[FakeVllm], publisher: WeightPublisher
) -> None:
    publisher.attach()
    before = len(servers[0].calls)
    publisher.publish(1, list(WEIGHTS.items())[:2])

    assert servers[0].calls[before:] == [
        *("/health", "/get_world_size", "/weight_info"),
        "/pause",
        *("/start_weight_update", "/update_weights", "/update_weights", "/finish_weight_update"),
        *("/weight_info", "/reset_prefix_cache"),
        "/resume",
    ]


def test_a_server_that_answers_but_spoils_every_transfer_is_left_out(
    servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
) -> None:
    servers[1].faults["/update_weights"] = broken
    publisher = connected(urls_of(servers), timeout_s=60.0)
    start = time.monotonic()

    result = publisher.publish(1, WEIGHTS.items())

    (failed,) = result.failed
    assert failed.error is not None
    assert (failed.server, failed.error.edge) == (servers[1].url, Edge.SEND)
    assert "RuntimeError: broken" in failed.error.reason
    assert runs(servers[0], "1")
    assert not servers[1].is_paused
    assert time.monotonic() - start < 50  # nobody waited for a deadline


def test_a_server_that_falls_silent_costs_one_deadline(
    servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
) -> None:
    publisher = connected(urls_of(servers), timeout_s=3.0)
    publisher.attach()
    silence = threading.Event()
    for path in ("/update_weights", "/health"):
        servers[1].faults[path] = silence.wait
    servers[1].faults["/health"] = at_call(2, silence.wait)
    start = time.monotonic()

    result = publisher.publish(1, WEIGHTS.items())

    silence.set()
    assert [failed.server for failed in result.failed] == [servers[1].url]
    assert runs(servers[0], "1")
    assert time.monotonic() - start < 3.0 * 3


def test_a_server_that_reports_another_version_has_failed(servers: list[FakeVllm], publisher: WeightPublisher) -> None:
    publisher.attach()
    servers[1].faults["/reset_prefix_cache"] = lambda: setattr(servers[1], "version", "0")
    servers[1].faults["/weight_info"] = at_call(2, lambda: setattr(servers[1], "version", "0"))

    result = publisher.publish(1, WEIGHTS.items())

    (failed,) = result.failed
    assert failed.error is not None
    assert failed.error.edge == Edge.VERIFY
    assert "'0', not '1'" in failed.error.reason


@pytest.mark.parametrize("path", ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_whatever_fails_every_server_is_resumed(
    servers: list[FakeVllm], connected: Callable[..., WeightPublisher], path: str
) -> None:
    for fake in servers:
        fake.faults[path] = broken
    publisher = connected(urls_of(servers), timeout_s=2.0)

    with pytest.raises(WeightSyncError, match="no inference server runs the new weights"):
        publisher.publish(1, WEIGHTS.items())

    assert not any(fake.is_paused for fake in servers)
    assert all(fake.calls[-1] == "/resume" for fake in servers)


def test_ensure_current_asks_each_server_once_and_sends_nothing_when_all_are_current(
    servers: list[FakeVllm], publisher: WeightPublisher
) -> None:
    publisher.publish(1, WEIGHTS.items())
    before = [len(fake.calls) for fake in servers]

    result = publisher.ensure_current(1, WEIGHTS.items())

    assert result.failed == ()
    assert [fake.calls[n:] for fake, n in zip(servers, before, strict=True)] == [["/weight_info"], ["/weight_info"]]


def test_attaching_with_nobody_there_fails_at_once(connected: Callable[..., WeightPublisher]) -> None:
    publisher = connected(["http://127.0.0.1:9"])

    with pytest.raises(WeightSyncError, match=r"127\.0\.0\.1:9"):
        publisher.attach()


@given(edges=st.lists(st.sampled_from(list(Edge)), max_size=8))
def test_the_state_machine_never_sends_unpaused_and_never_ends_paused(edges: list[Edge]) -> None:
    state, taken = State.IDLE, []
    for edge in edges:
        try:
            state = advance(state, edge)
        except ValueError:
            continue
        taken.append(edge)

    if Edge.SEND in taken:
        assert Edge.PAUSE in taken[: taken.index(Edge.SEND)]
    if Edge.VERIFY in taken:
        assert Edge.SEND in taken[: taken.index(Edge.VERIFY)]
    assert (state == State.RESUMED) == (taken[-1:] == [Edge.RESUME])
    if state not in (State.IDLE, State.RESUMED):
        assert advance(state, Edge.RESUME) == State.RESUMED


@given(timeout_s=st.floats(0.1, 1000))
def test_no_control_call_outlasts_the_transfer(timeout_s: float) -> None:
    limits = Deadlines.within(timeout_s)

    assert max(limits.probe_s, limits.attach_s, limits.pause_s, limits.verify_s, limits.resume_s) <= limits.send_s
    assert limits.send_s == timeout_s


def control_with(handler: Callable[[httpx.Request], httpx.Response]) -> VllmControl:
    return VllmControl("http://engine:8000/v1", transport=httpx.MockTransport(handler))


def test_the_control_client_speaks_the_routes_of_vllm() -> None:
    seen: list[tuple[str, str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, str(request.url), json.loads(request.content or b"null")))
        return httpx.Response(200, json={"world_size": 4, "is_paused": True, "weight_version": "3", "success": True})

    control = control_with(handler)
    control.pause(timeout_s=1)
    control.init_transfer({"rank_offset": 1}, timeout_s=1)
    control.update_weights({"commit": True}, timeout_s=1)
    control.finish_update("5", timeout_s=1)
    control.reset_prefix_cache(timeout_s=1)

    assert seen == [
        ("POST", "http://engine:8000/pause?mode=keep&clear_cache=true", None),
        ("POST", "http://engine:8000/init_weight_transfer_engine", {"init_info": {"rank_offset": 1}}),
        ("POST", "http://engine:8000/update_weights", {"update_info": {"commit": True}}),
        ("POST", "http://engine:8000/finish_weight_update", {"weight_version": "5"}),
        ("POST", "http://engine:8000/reset_prefix_cache?reset_running_requests=true", None),
    ]
    assert control.world_size(timeout_s=1) == 4
    assert control.is_paused(timeout_s=1)
    assert control.weight_version(timeout_s=1) == "3"


def test_requests_in_flight_keep_their_keys_and_values_if_nothing_is_to_be_recomputed() -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url.query, "ascii"))
        return httpx.Response(200, json={"success": False})

    control = control_with(handler)
    control.pause(recompute=False, timeout_s=1)
    is_empty = control.reset_prefix_cache(recompute=False, timeout_s=1)

    assert seen == ["mode=keep&clear_cache=false", "reset_running_requests=false"]
    assert not is_empty


def test_a_slow_server_is_an_error_that_names_server_edge_and_deadline() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("slow", request=request)

    with pytest.raises(ServerSyncError) as caught:
        control_with(handler).pause(timeout_s=1.5)

    assert (
        str(caught.value) == "inference server http://engine:8000 failed to pause: /pause did not answer within 1.5 s"
    )
    assert caught.value.edge == Edge.PAUSE


def test_a_server_without_rl_routes_is_told_how_to_get_them() -> None:
    with pytest.raises(ServerSyncError, match="VLLM_SERVER_DEV_MODE=1"):
        control_with(lambda _: httpx.Response(404)).pause(timeout_s=1)


def test_a_connection_is_never_used_twice() -> None:
    fake = FakeVllm()
    control = VllmControl(fake.url)
    fake.faults["/pause"] = broken
    with pytest.raises(ServerSyncError, match="answered 500"):
        control.pause(timeout_s=2)

    control.resume(timeout_s=2)

    assert len(fake.http.connections) == 2
    fake.die()
