"""Who is behind a URL, and how weights get there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from atroposlib.errors import ConfigError
from tests.trainer.weight_sync.fake_vllm import FakeVllm
from tests.trainer.weight_sync.sglang_server import FakeSglang
from trainer.weight_sync.choice import choose_transport
from trainer.weight_sync.config import TransportName, WeightSyncConfig
from trainer.weight_sync.connect import connect
from trainer.weight_sync.engines.control import EngineName
from trainer.weight_sync.engines.detect import LateControl, control_for, engine_at
from trainer.weight_sync.engines.sglang import SglangControl
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError, TransferError, WeightSyncError
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports.base import Member, NamedWeights
from trainer.weight_sync.transports.chosen import ChosenTransport

WEIGHTS = {f"layer.{i}.weight": torch.full((4, 4), float(i)) for i in range(3)}
VLLM, SGLANG = "http://vllm:8000", "http://sglang:30000"


@pytest.fixture
def sglang() -> Iterator[FakeSglang]:
    fake = FakeSglang()
    yield fake
    fake.die()


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    fake = FakeVllm()
    yield fake
    fake.die()


@pytest.fixture
def silent() -> Iterator[str]:
    """A URL where connections are taken and nothing is said."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler, bind_and_activate=True)
    yield f"http://127.0.0.1:{server.server_port}"
    server.server_close()


# Who is there


def test_each_engine_is_known_by_its_routes(vllm: FakeVllm, sglang: FakeSglang) -> None:
    assert engine_at(vllm.url, timeout_s=2) == "vllm"
    assert engine_at(f"{sglang.url}/v1", timeout_s=2) == "sglang"


def test_another_server_is_neither(sglang: FakeSglang) -> None:
    with pytest.raises(ServerSyncError, match="neither vLLM nor SGLang: /version answered 404") as caught:
        engine_at(f"{sglang.url}/elsewhere", timeout_s=2)

    assert caught.value.edge == Edge.ATTACH


def test_a_server_that_answers_gets_its_own_control(vllm: FakeVllm, sglang: FakeSglang) -> None:
    assert isinstance(control_for(vllm.url, 2), VllmControl)
    assert isinstance(control_for(sglang.url, 2), SglangControl)


def test_a_server_that_does_not_answer_is_asked_again_when_it_is_needed(sglang: FakeSglang) -> None:
    control = LateControl("http://127.0.0.1:9/v1")
    with pytest.raises(ServerSyncError, match=r"127\.0\.0\.1:9"):
        control.health(timeout_s=1)
    assert not control.is_known
    control.url = sglang.url

    control.pause("keep", recompute=True, timeout_s=2)

    assert (control.engine, control.is_known, sglang.is_paused) == ("sglang", True, True)
    assert isinstance(control.resolved, SglangControl)
    control.close()


def test_connecting_waits_for_nobody_long(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.weight_sync.connect.DETECT_S", 0.1)

    # Hangs, were it to wait for an answer.
    publisher = connect([silent] * 5 + ["http://127.0.0.1:9"])

    publisher.close()


# Which transport


@pytest.mark.parametrize(
    ("engines", "has_cuda", "is_adapter", "chosen"),
    [
        (("vllm",), False, False, "gloo"),
        (("vllm",), True, False, "nccl"),
        (("sglang",), False, False, "gloo"),
        (("sglang",), True, False, "nccl"),
        (("vllm", "sglang"), True, False, "disk"),
        (("vllm",), True, True, "lora"),
        ((), False, False, "gloo"),
    ],
)
def test_auto(engines: Sequence[EngineName], has_cuda: bool, is_adapter: bool, chosen: TransportName) -> None:
    by_url = {f"http://{engine}": engine for engine in engines}

    name = choose_transport("auto", by_url, has_cuda=has_cuda, is_adapter=is_adapter, pause_mode="keep")

    assert name == chosen


@pytest.mark.parametrize(
    ("asked", "engines", "told"),
    [
        ("delta", {SGLANG: "sglang"}, rf"delta is for vLLM, but {SGLANG} runs SGLang; use weight_sync.transport=gloo"),
        ("ipc", {VLLM: "vllm", SGLANG: "sglang"}, rf"ipc is for vLLM, but {SGLANG} runs SGLang; .*transport=disk"),
        (
            "gloo",
            {VLLM: "vllm", SGLANG: "sglang"},
            rf"{VLLM} runs vllm and {SGLANG} runs sglang; .*transport=disk",
        ),
        ("lora", {VLLM: "vllm"}, "use_peft=true, or use weight_sync.transport=gloo"),
    ],
)
def test_a_transport_that_servers_cannot_take_is_refused_with_their_names_and_one_that_works(
    asked: TransportName, engines: Mapping[str, EngineName], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        choose_transport(asked, engines, has_cuda=False, is_adapter=False, pause_mode="keep")


def test_an_adapter_on_sglang_needs_requests_to_end() -> None:
    engines: dict[str, EngineName] = {SGLANG: "sglang"}
    with pytest.raises(ConfigError, match=rf"{SGLANG}.*pause_mode=abort or wait"):
        choose_transport("auto", engines, has_cuda=False, is_adapter=True, pause_mode="keep")

    assert choose_transport("auto", engines, has_cuda=False, is_adapter=True, pause_mode="abort") == "lora"


def test_a_configuration_that_does_not_suit_the_servers_fails_at_once(vllm: FakeVllm, sglang: FakeSglang) -> None:
    with pytest.raises(ConfigError, match="servers of one engine"):
        connect([vllm.url, sglang.url], WeightSyncConfig(transport="gloo"))


def test_files_need_a_folder_and_a_model(vllm: FakeVllm, tmp_path: Path) -> None:
    config = WeightSyncConfig(transport="disk")

    with pytest.raises(ConfigError, match=r"set weight_sync\.folder"):
        connect([vllm.url], config)
    with pytest.raises(ConfigError, match="folder of the model"):
        connect([vllm.url], config, folder=tmp_path)


# Publishing through what was chosen


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_each_engine_is_published_to_in_its_own_way(kind: str, vllm: FakeVllm, sglang: FakeSglang) -> None:
    fake: Any = {"vllm": vllm, "sglang": sglang}[kind]
    publisher = connect([fake.url], WeightSyncConfig(timeout_s=5), has_cuda=False)

    result = publisher.publish(1, WEIGHTS.items())

    publisher.close()
    assert result.failed == ()
    assert fake.version == "1"
    assert all(torch.equal(fake.weights[name], tensor.bfloat16()) for name, tensor in WEIGHTS.items())


def test_a_pool_that_comes_up_after_the_trainer_is_published_to(
    sglang: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.weight_sync.connect.DETECT_S", 0.2)
    loading = threading.Event()
    sglang.faults["/server_info"] = loading.wait
    publisher = connect([sglang.url], WeightSyncConfig(timeout_s=5), has_cuda=False)
    loading.set()

    result = publisher.publish(1, iter(WEIGHTS.items()))

    publisher.close()
    assert result.failed == ()
    assert torch.equal(sglang.weights["layer.2.weight"], torch.full((4, 4), 2.0).bfloat16())


class FakeTransport:
    """Remembers what was asked of it."""

    def __init__(self, engines: Mapping[str, EngineName]) -> None:
        self.engines = dict(engines)
        self.events: list[Any] = []

    def prepare(self, weights: NamedWeights, weight_version: str) -> str:
        self.events.append("prepare")
        return weight_version

    def open(self, members: Sequence[Member], *, timeout_s: float) -> None:
        self.events.append("open")

    def send(self, shipment: str, *, timeout_s: float) -> None:
        self.events.append(f"send {shipment}")

    def leave(self) -> None:
        self.events.append("leave")


def members(*controls: VllmControl | SglangControl) -> list[Member]:
    return [Member(control, 1, "default") for control in controls]


def test_weights_are_prepared_once_however_often_they_are_sent() -> None:
    chosen = ChosenTransport(FakeTransport, {VLLM: "vllm"})
    shipment = chosen.prepare(WEIGHTS.items(), "1")
    for _ in range(2):
        chosen.open(members(VllmControl(VLLM)), timeout_s=1)
        chosen.send(shipment, timeout_s=1)

    transport: Any = chosen._transport
    assert transport.events == ["prepare", "open", "send 1", "open", "send 1"]


def test_another_engine_among_the_servers_makes_it_choose_again() -> None:
    chosen = ChosenTransport(FakeTransport, {VLLM: "vllm"})
    first: Any = chosen._transport
    shipment = chosen.prepare(WEIGHTS.items(), "1")

    chosen.open(members(VllmControl(VLLM), SglangControl(SGLANG)), timeout_s=1)
    chosen.send(shipment, timeout_s=1)

    second: Any = chosen._transport
    assert first.events == ["prepare", "leave"]
    assert second.engines == {VLLM: "vllm", SGLANG: "sglang"}
    assert second.events == ["prepare", "open", "send 1"]  # while the engines still generate


def test_a_stranger_that_does_not_suit_is_the_culprit_and_the_choice_stands() -> None:
    def choose(engines: Mapping[str, EngineName]) -> FakeTransport:
        if "sglang" in engines.values():
            raise ConfigError("delta is for vLLM")
        return FakeTransport(engines)

    chosen = ChosenTransport(choose, {VLLM: "vllm"})

    with pytest.raises(TransferError, match="delta is for vLLM") as caught:
        chosen.open(members(VllmControl(VLLM), SglangControl(SGLANG)), timeout_s=1)

    assert set(caught.value.culprits) == {SGLANG}
    chosen.open(members(VllmControl(VLLM)), timeout_s=1)


def test_servers_that_come_late_are_prepared_for_before_they_are_paused() -> None:
    chosen = ChosenTransport(FakeTransport, {})
    shipment = chosen.prepare(iter(WEIGHTS.items()), "1")

    chosen.open(members(VllmControl(VLLM)), timeout_s=1)
    transport: Any = chosen._transport
    assert transport.events == ["prepare", "open"]

    chosen.send(shipment, timeout_s=1)
    assert transport.events == ["prepare", "open", "send 1"]


def test_an_opening_that_prepared_for_too_long_goes_no_further() -> None:
    class Slow(FakeTransport):
        def prepare(self, weights: NamedWeights, weight_version: str) -> str:
            time.sleep(0.05)
            return super().prepare(weights, weight_version)

    chosen = ChosenTransport(Slow, {})
    shipment = chosen.prepare(WEIGHTS.items(), "1")

    with pytest.raises(TransferError, match="its time was up"):
        chosen.open(members(VllmControl(VLLM)), timeout_s=0.01)

    transport: Any = chosen._transport
    assert transport.events == ["prepare"]
    chosen.open(members(VllmControl(VLLM)), timeout_s=1)
    chosen.send(shipment, timeout_s=1)
    assert transport.events == ["prepare", "open", "send 1"]


def test_nothing_can_be_sent_before_a_server_has_answered() -> None:
    chosen = ChosenTransport(FakeTransport, {})
    shipment = chosen.prepare(iter(WEIGHTS.items()), "1")

    with pytest.raises(WeightSyncError, match="no inference server has answered yet"):
        chosen.send(shipment, timeout_s=1)
    assert [name for name, _ in shipment.weights] == list(WEIGHTS)
