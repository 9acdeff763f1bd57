"""What a publication promises when something breaks: a named error or a recovery in time, and no server left paused."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.weight_sync import doomed_trainer
from tests.trainer.weight_sync.fake_vllm import FakeVllm
from tests.trainer.weight_sync.publications import WEIGHTS, at_call, broken, generates, runs, urls_of
from tests.trainer.weight_sync.stalling_proxy import StallingProxy
from trainer.weight_sync import fan_out, passage
from trainer.weight_sync.engines.control import UNKNOWN_VERSION, EngineControl
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError, TakenOverError, VersionOrderError, WeightSyncError
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports import gloo_group
from trainer.weight_sync.transports.base import Member, NamedWeights
from trainer.weight_sync.versions import SentVersions
from trainer.weight_sync.watched import run_within

EVERY_STEP = {
    "/health": Edge.ATTACH,
    "/init_weight_transfer_engine": Edge.ATTACH,
    "/pause": Edge.PAUSE,
    "/start_weight_update": Edge.SEND,
    "/update_weights": Edge.SEND,
    "/finish_weight_update": Edge.SEND,
    "/reset_prefix_cache": Edge.VERIFY,
    "/resume": Edge.RESUME,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fan_out, gloo_group, passage):
        monkeypatch.setattr(module, "GRACE_S", 0.3)
    monkeypatch.setattr(gloo_group, "READY_TIMEOUT_S", 0.3)


def until(condition: Callable[[], bool], *, timeout_s: float = 40.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


class TestAServerThatFails:
    @pytest.mark.parametrize("path", EVERY_STEP)
    def test_dead_in_any_state_it_is_named_and_the_other_is_served(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher], path: str
    ) -> None:
        servers[1].faults[path] = servers[1].die

        result = connected(urls_of(servers)).publish(1, WEIGHTS.items())

        (failed,) = result.failed
        assert failed.server == servers[1].url
        assert servers[1].url in str(failed.error)
        assert runs(servers[0], "1")

    @pytest.mark.parametrize("path", ["/health", "/pause", "/start_weight_update", "/resume"])
    def test_silent_in_any_state_it_is_named_and_serves_again_when_it_answers_again(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher], path: str
    ) -> None:
        target = servers[1].url.removeprefix("http://").split(":")
        proxy = StallingProxy((target[0], int(target[1])))
        publisher = connected([servers[0].url, proxy.url], timeout_s=2.0)
        publisher.attach()
        proxy.stall_at(f" {path}".encode())

        result = publisher.publish(1, WEIGHTS.items())
        proxy.flow()

        assert [failed.server for failed in result.failed] == [proxy.url]
        assert runs(servers[0], "1")
        assert until(lambda: servers[1].open_calls == 0)
        assert publisher.ensure_current(1, WEIGHTS.items()).failed == ()
        assert runs(servers[1], "1")
        proxy.close()

    def test_cut_off_from_the_trainers_store_it_costs_one_attempt(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher], impatient: None
    ) -> None:
        links: list[StallingProxy] = []

        def route(address: str, port: int) -> tuple[str, int]:
            links.append(StallingProxy((address, port)))
            return "127.0.0.1", links[-1].port

        servers[1].route_to = route
        servers[1].faults["/update_weights"] = at_call(2, lambda: links[0].stall())

        result = connected(urls_of(servers), timeout_s=5.0).publish(1, WEIGHTS.items())

        assert result.failed == ()
        assert all(runs(fake, "1") for fake in servers)
        assert len(links) == 2  # a fresh group
        # The engine gave up the store that never answered, and is free again.
        assert until(lambda: any(isinstance(error, TimeoutError) for error in servers[1].errors))
        for link in links:
            link.close()

    def test_that_lacks_the_tensors_names_them_keeps_its_weights_and_goes_on(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        publisher = connected(urls_of(servers))
        publisher.publish(1, WEIGHTS.items())
        servers[1].shapes = {"other.weight": (3, 3)}

        result = publisher.publish(2, WEIGHTS.items())

        (failed,) = result.failed
        assert failed.error is not None
        assert (failed.server, failed.error.edge) == (servers[1].url, Edge.SEND)
        assert "layer.0.weight" in failed.error.reason
        assert generates(servers[1], "1")
        assert runs(servers[0], "2")

    def test_that_answers_questions_but_never_ends_a_transfer_is_left_out(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher], impatient: None
    ) -> None:
        endless = threading.Event()
        servers[1].faults["/finish_weight_update"] = endless.wait

        result = connected(urls_of(servers), timeout_s=2.0).publish(1, WEIGHTS.items())
        endless.set()

        (failed,) = result.failed
        assert failed.error is not None
        assert (failed.server, failed.error.edge) == (servers[1].url, Edge.SEND)
        assert runs(servers[0], "1")

    def test_a_resume_that_fails_once_is_tried_again(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        servers[1].faults["/resume"] = at_call(1, broken)

        result = connected(urls_of(servers)).publish(1, WEIGHTS.items())

        assert result.failed == ()
        assert all(runs(fake, "1") for fake in servers)

    def test_a_pause_that_comes_late_is_undone_at_the_next_look(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        publisher = connected(urls_of(servers))
        servers[1].faults["/pause"] = at_call(1, broken)
        assert publisher.publish(1, WEIGHTS.items()).failed == ()  # at the second attempt
        servers[1].is_paused = True  # the first one's request was under way all the time

        result = publisher.ensure_current(1, WEIGHTS.items())

        assert result.failed == ()
        assert not servers[1].is_paused


class Stuck:
    """A transport that never comes back from one of its calls, the first time."""

    def __init__(self, servers: Sequence[FakeVllm], method: str) -> None:
        self.calls: list[str] = []
        self._servers = servers
        self._method = method

    def prepare(self, weights: NamedWeights, weight_version: str) -> str:
        return weight_version

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        self._enter("open")

    def send(self, shipment: str, *, timeout_s: float) -> None:
        self._enter("send")
        for fake in self._servers:
            fake.version = shipment

    def leave(self) -> None:
        self._enter("leave")

    def _enter(self, method: str) -> None:
        self.calls.append(method)
        if self._method == method and self.calls.count(method) == 1:
            threading.Event().wait()


@pytest.mark.usefixtures("impatient")
class TestACollectiveThatNeverEnds:
    def publisher(self, servers: list[FakeVllm], transport: Stuck) -> WeightPublisher:
        controls = [VllmControl(fake.url) for fake in servers]
        return WeightPublisher(controls, transport, ThreadPoolExecutor(16), timeout_s=1.0)

    @pytest.mark.parametrize("method", ["open", "send"])
    def test_it_is_left_behind_and_the_next_attempt_begins_anew(self, servers: list[FakeVllm], method: str) -> None:
        transport = Stuck(servers, method)
        publisher = self.publisher(servers, transport)

        result = publisher.publish(1, ())

        assert result.failed == ()
        assert [call for call in transport.calls if call != "prepare"][-3:] == ["leave", "open", "send"]
        assert not any(fake.is_paused for fake in servers)
        stuck = [
            thread for thread in threading.enumerate() if thread.name in ("weight-sync-attach", "weight-sync-send")
        ]
        assert stuck
        assert all(thread.daemon for thread in stuck)
        publisher.close()

    def test_its_error_names_edge_and_servers(self, servers: list[FakeVllm], caplog: pytest.LogCaptureFixture) -> None:
        publisher = self.publisher(servers, Stuck(servers, "send"))

        publisher.publish(1, ())

        assert "failed to send: weight-sync-send did not return within 1.3 s" in caplog.text
        assert all(fake.url in caplog.text for fake in servers)
        publisher.close()

    def test_a_group_that_cannot_be_left_does_not_hold_up_the_next(self, servers: list[FakeVllm]) -> None:
        servers[1].faults["/pause"] = at_call(1, broken)
        transport = Stuck(servers, "leave")
        publisher = self.publisher(servers, transport)

        result = publisher.publish(1, ())

        assert result.failed == ()
        assert transport.calls == ["open", "leave", "open", "send"]
        publisher.close()

    def test_an_error_passes_through_and_a_late_end_is_a_timeout(self) -> None:
        with pytest.raises(RuntimeError, match="broken"):
            run_within(broken, timeout_s=5, name="quick")
        with pytest.raises(TimeoutError, match=r"endless did not return within 0\.01 s"):
            run_within(threading.Event().wait, timeout_s=0.01, name="endless")


class TestATrainerThatDies:
    @pytest.mark.parametrize(
        ("path", "call"),
        [
            *((path, 1) for path in ("/health", "/init_weight_transfer_engine", "/pause", "/start_weight_update")),
            *(("/update_weights", call) for call in (2, 4)),  # a bucket, the commit
            *((path, 1) for path in ("/finish_weight_update", "/reset_prefix_cache", "/resume")),
        ],
    )
    def test_in_any_state_its_successor_serves_and_no_engine_hangs(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher], path: str, call: int
    ) -> None:
        deaths = threading.Event()
        pids: list[int] = []

        def kill() -> None:
            until(lambda: bool(pids))
            os.kill(pids[0], signal.SIGKILL)
            deaths.set()

        servers[1].faults[path] = at_call(call, kill)
        trainer = doomed_trainer.start(urls_of(servers))
        assert trainer.pid is not None
        pids.append(trainer.pid)
        trainer.join(40)
        assert trainer.exitcode == -signal.SIGKILL
        assert deaths.is_set()
        # gloo notices at once unless a bucket is under way: then after 2 s and a bit.
        assert until(lambda: all(fake.open_calls == 0 for fake in servers), timeout_s=10)

        successor = connected(urls_of(servers))
        successor.attach()
        assert not any(fake.is_paused for fake in servers)
        result = successor.publish(5000, WEIGHTS.items())

        assert result.failed == ()
        assert all(runs(fake, "5000") for fake in servers)

    def test_a_frozen_trainer_does_not_hold_the_engines(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher], impatient: None
    ) -> None:
        pids: list[int] = []

        def freeze() -> None:
            until(lambda: bool(pids))
            os.kill(pids[0], signal.SIGSTOP)

        servers[1].faults["/update_weights"] = at_call(2, freeze)
        trainer = doomed_trainer.start(urls_of(servers))
        assert trainer.pid is not None
        pids.append(trainer.pid)

        assert until(lambda: any(isinstance(error, TimeoutError) for error in servers[1].errors))
        assert until(lambda: all(fake.open_calls == 0 for fake in servers), timeout_s=10)
        successor = connected(urls_of(servers))
        successor.attach()
        result = successor.publish(5000, WEIGHTS.items())

        assert result.failed == ()
        trainer.kill()
        trainer.join(40)


class TestABucketUnderWay:
    def test_one_that_never_comes_ends_at_its_own_deadline(self) -> None:
        store = gloo_group.host_store("127.0.0.1", timeout_s=5)
        with ThreadPoolExecutor() as workers:
            joining = workers.submit(
                gloo_group.join, "127.0.0.1", store.port, rank=1, rank_offset=1, world_size=2, timeout_s=5
            )
            missing = gloo_group.wait_for_workers(
                store, {gloo_group.joining_counter(1): 1}, deadline=time.monotonic() + 5, check=lambda: None
            )
            group = gloo_group.open_rank_0(store, world_size=2, address="127.0.0.1", timeout_s=5)
            store.set(gloo_group.go_key(0), "1")

            with pytest.raises(RuntimeError, match="Timed out"):
                gloo_group.receive(
                    joining.result(), torch.empty(8, dtype=torch.uint8), sequence=0, rank_offset=1, timeout_s=0.2
                )

        assert missing == set()
        del group

    @given(size_bytes=st.integers(0, 2**33), bytes_per_s=st.floats(1e6, 1e11))
    def test_its_deadline_follows_the_pace_and_is_never_short(self, size_bytes: int, bytes_per_s: float) -> None:
        limit_s = gloo_group.bucket_timeout_s(size_bytes, bytes_per_s)

        assert limit_s >= 2.0
        assert limit_s >= 10 * size_bytes / bytes_per_s
        assert gloo_group.bucket_timeout_s(2**26, 1e9) < 3.0  # 64 MiB at an ordinary pace
        assert gloo_group.bucket_timeout_s(2**26, None) < 11.0


class TestTwoTrainers:
    def test_the_one_whose_server_was_taken_is_told_and_does_not_fight_back(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        first, second = connected(urls_of(servers)), connected([servers[1].url])
        first.publish(1, WEIGHTS.items())
        second.publish(40, WEIGHTS.items())

        result = first.publish(2, WEIGHTS.items())

        (failed,) = result.failed
        assert isinstance(failed.error, TakenOverError)
        assert (failed.server, failed.error.found, failed.error.expected) == (servers[1].url, "40", "1")
        assert "stop that trainer" in str(failed.error)
        assert runs(servers[0], "2")
        assert runs(servers[1], "40")
        assert second.publish(41, WEIGHTS.items()).failed == ()

    def test_if_all_are_taken_the_publication_ends_with_that_error(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        first, second = connected(urls_of(servers)), connected(urls_of(servers))
        first.publish(1, WEIGHTS.items())
        second.publish(40, WEIGHTS.items())

        with pytest.raises(TakenOverError, match="another trainer publishes to it"):
            first.ensure_current(1, WEIGHTS.items())

        assert all(runs(fake, "40") for fake in servers)

    def test_a_server_that_was_restarted_is_not_taken_over(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        publisher = connected(urls_of(servers))
        publisher.publish(1, WEIGHTS.items())
        servers[1].restart()

        assert publisher.publish(2, WEIGHTS.items()).failed == ()

    @given(sent=st.lists(st.integers(0, 9), unique=True).map(sorted), first=st.integers(0, 9), then=st.integers(0, 9))
    def test_only_a_version_that_is_neither_ours_nor_the_first_seen_is_foreign(
        self, sent: list[int], first: int, then: int
    ) -> None:
        versions = SentVersions()
        versions.met("http://engine", str(first))
        for version in sent:
            versions.begin(version)
        versions.met("http://engine", UNKNOWN_VERSION)

        if then == first or then in sent:
            versions.met("http://engine", str(then))
        else:
            with pytest.raises(TakenOverError):
                versions.met("http://engine", str(then))


class TestVersions:
    def test_an_older_one_is_refused_before_any_server_is_touched(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        publisher = connected(urls_of(servers))
        publisher.publish(5, WEIGHTS.items())
        before = len(servers[0].calls)

        with pytest.raises(VersionOrderError, match=r"version 4 .* after version 5.*number it 6"):
            publisher.publish(4, WEIGHTS.items())

        assert len(servers[0].calls) == before
        assert publisher.publish(5, WEIGHTS.items()).failed == ()  # the same again is a repair


class TestRequestsInFlight:
    def test_abort_ends_them_and_then_nothing_is_frozen(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        connected([servers[0].url], pause_mode="abort").publish(1, WEIGHTS.items())

        assert servers[0].pauses == ["mode=abort&clear_cache=false"]
        assert runs(servers[0], "1")

    def test_wait_lets_them_end(self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]) -> None:
        connected([servers[0].url], pause_mode="wait").publish(1, WEIGHTS.items())

        assert servers[0].pauses == ["mode=wait&clear_cache=false"]
        assert runs(servers[0], "1")

    def test_one_that_does_not_end_in_time_is_aborted(
        self,
        servers: list[FakeVllm],
        connected: Callable[..., WeightPublisher],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        endless = threading.Event()
        servers[1].faults["/pause"] = at_call(1, endless.wait)

        result = connected(urls_of(servers), pause_mode="wait", timeout_s=2.0).publish(1, WEIGHTS.items())
        endless.set()

        assert result.failed == ()
        assert [pause.split("&")[0] for pause in servers[0].pauses] == ["mode=wait"]
        assert "mode=abort&clear_cache=false" in servers[1].pauses
        assert f"aborting them: inference server {servers[1].url} failed to pause" in caplog.text


class TestTheServersOfAPublication:
    def test_they_can_be_replaced_between_two(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        publisher = connected([servers[0].url])
        publisher.publish(1, WEIGHTS.items())

        publisher.set_controls([VllmControl(servers[1].url)])
        publisher.publish(2, WEIGHTS.items())

        assert runs(servers[0], "1")
        assert runs(servers[1], "2")

    def test_one_can_come_back_under_its_url_after_its_control_was_closed(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        publisher = connected([])
        controls = [VllmControl(fake.url) for fake in servers]
        publisher.set_controls(controls)
        publisher.publish(1, WEIGHTS.items())

        controls[1].close()
        publisher.set_controls([controls[0], VllmControl(servers[1].url)])
        result = publisher.publish(2, WEIGHTS.items())

        assert result.failed == ()
        assert all(runs(fake, "2") for fake in servers)
        assert servers[0].calls.count("/pause") == 2  # no attempt was wasted

    def test_those_of_the_start_are_closed_when_others_take_their_place(self, servers: list[FakeVllm]) -> None:
        first, second = VllmControl(servers[0].url), VllmControl(servers[0].url)
        publisher = WeightPublisher([first], Stuck(servers, "never"), ThreadPoolExecutor(4))

        publisher.set_controls([second])

        with pytest.raises(ServerSyncError, match="closed"):
            first.health(timeout_s=1)
        second.health(timeout_s=1)
        publisher.close()

    def test_a_newcomer_that_a_dead_trainer_left_paused_is_resumed(
        self, servers: list[FakeVllm], connected: Callable[..., WeightPublisher]
    ) -> None:
        publisher = connected([servers[0].url])
        publisher.publish(1, WEIGHTS.items())
        servers[1].version, servers[1].is_paused = "1", True

        publisher.set_controls([VllmControl(fake.url) for fake in servers])
        publisher.ensure_current(1, WEIGHTS.items())

        assert not servers[1].is_paused

    def test_with_none_at_all_a_publication_says_so(self, connected: Callable[..., WeightPublisher]) -> None:
        publisher = connected(["http://127.0.0.1:9"])
        publisher.set_controls([])

        with pytest.raises(WeightSyncError, match="no inference server"):
            publisher.publish(1, WEIGHTS.items())


@pytest.mark.usefixtures("impatient")
class TestProof:
    def publisher(
        self, servers: list[FakeVllm], prove: Callable[[EngineControl, str], None], **options: Any
    ) -> WeightPublisher:
        controls = [VllmControl(fake.url) for fake in servers]
        return WeightPublisher(
            controls, Stuck(servers, "never"), ThreadPoolExecutor(16), timeout_s=2.0, prove=prove, **options
        )

    def test_it_is_asked_of_each_server_when_it_generates_again(self, servers: list[FakeVllm]) -> None:
        asked: list[tuple[str, str, bool]] = []
        paused = {fake.url: fake for fake in servers}

        def prove(control: EngineControl, version: str) -> None:
            asked.append((control.url, version, paused[control.url].is_paused))

        publisher = self.publisher(servers, prove)
        publisher.publish(3, ())

        assert sorted(asked) == sorted((fake.url, "3", False) for fake in servers)
        publisher.close()

    def test_who_does_not_prove_it_has_failed_and_is_sent_to_again(self, servers: list[FakeVllm]) -> None:
        liars = {servers[1].url}

        def prove(control: EngineControl, version: str) -> None:
            if control.url in liars:
                raise ServerSyncError(control.url, Edge.VERIFY, "its logprobs are those of other weights")

        publisher = self.publisher(servers, prove)
        (failed,) = publisher.publish(3, ()).failed
        liars.clear()
        result = publisher.ensure_current(3, ())

        assert failed.error is not None
        assert (failed.server, failed.error.edge) == (servers[1].url, Edge.VERIFY)
        assert result.failed == ()
        assert [fake.calls.count("/pause") for fake in servers] == [1, 2]
        publisher.close()

    def test_an_engine_that_does_not_answer_it_fails_in_time(self, servers: list[FakeVllm]) -> None:
        endless = threading.Event()

        def prove(control: EngineControl, version: str) -> None:
            endless.wait()

        publisher = self.publisher(servers, prove)

        with pytest.raises(WeightSyncError, match=r"failed to verify: no answer within 2 s"):
            publisher.publish(3, ())

        endless.set()
        publisher.close()
