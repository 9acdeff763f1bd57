"""What the delta transport promises: bit for bit what a full push gives, and a full push wherever a delta does not fit."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.weight_sync.engines.control import UNKNOWN_VERSION, EngineControl
from trainer.weight_sync.errors import (
    DeltaBaseError,
    DeltaCorruptError,
    DiskFullError,
    ForeignWeightsError,
    ServerSyncError,
    TransferError,
    WeightSyncError,
)
from trainer.weight_sync.passage import Prove
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports import delta, files
from trainer.weight_sync.transports.base import Member
from trainer.weight_sync.transports.delta import DeltaTransport
from trainer.weight_sync.transports.delta_files import write_full
from trainer.weight_sync.transports.delta_receiver import DeltaReceiver

Weights = dict[str, torch.Tensor]
SHAPES = {"embed": (200, 8), "layers.0.up": (64, 8), "norm": (8,)}


@dataclass
class FakeControl:
    """FAKE: a vLLM server with our delta engine, without HTTP and without a model. What it "runs" is `weights`."""

    url: str
    model_folder: Path
    engine: str = "vllm"
    version: str = UNKNOWN_VERSION
    weights: Weights = field(default_factory=dict)
    updates: list[dict[str, Any]] = field(default_factory=list)
    is_updating: bool = False
    is_standing_still: bool = False
    before_load: Callable[[Mapping[str, torch.Tensor]], None] = lambda _: None
    before_update: Callable[[dict[str, Any]], None] = lambda _: None
    receiver: DeltaReceiver = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.receiver = DeltaReceiver(self.model_folder, self._load)
        self.version = UNKNOWN_VERSION
        self.is_updating = False

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for number, (name, tensor) in enumerate(tensors.items()):
            if number == len(tensors) - 1:
                self.before_load(tensors)
            self.weights[name] = tensor.bfloat16()

    def start_update(self, *, timeout_s: float) -> None:
        if self.is_updating:
            raise ServerSyncError(self.url, Edge.SEND, "a weight update is already active")
        self.is_updating = True

    def update_weights(self, update_info: dict[str, Any], *, timeout_s: float) -> None:
        self.updates.append(update_info)
        try:
            self.before_update(update_info)
            info = dict(update_info)
            self.receiver.receive(Path(info.pop("path")), **info)
        except Exception as error:
            raise ServerSyncError(self.url, Edge.SEND, str(error)) from error

    def finish_update(self, weight_version: str | None, *, timeout_s: float) -> None:
        self.is_updating = False
        self.version = weight_version or self.version

    def weight_version(self, *, timeout_s: float) -> str:
        return self.version

    def is_paused(self, *, timeout_s: float) -> bool:
        return self.is_standing_still

    def pause(self, mode: str, *, recompute: bool, timeout_s: float) -> None:
        self.is_standing_still = True

    def resume(self, *, timeout_s: float) -> None:
        self.is_standing_still = False

    def reset_prefix_cache(self, *, recompute: bool, timeout_s: float) -> bool:
        return True

    def world_size(self, *, timeout_s: float) -> int:
        return 1

    def health(self, *, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        pass


def the_weights(version: int) -> Weights:
    """Float32, as a trainer holds them; from one version to the next some cross a step of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: tensor * 1.001**version for name, tensor in first.items()}


def as_bfloat16(weights: Weights) -> dict[str, list[int]]:
    return {name: tensor.bfloat16().view(torch.int16).flatten().tolist() for name, tensor in weights.items()}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(the_weights(0), folder / "model.safetensors")
    return folder


@pytest.fixture
def controls(model_folder: Path) -> list[FakeControl]:
    return [FakeControl("http://one", model_folder), FakeControl("http://two", model_folder)]


@pytest.fixture
def connect(
    tmp_path: Path, model_folder: Path, controls: list[FakeControl]
) -> Iterator[Callable[..., WeightPublisher]]:
    """A publisher over delta files, as each trainer has one."""
    publishers: list[WeightPublisher] = []

    def build(served: list[FakeControl] | None = None, prove: Prove | None = None) -> WeightPublisher:
        calls = ThreadPoolExecutor(max_workers=8)
        transport = DeltaTransport(
            calls, folder=tmp_path / "weights", keep=2, dtype=torch.bfloat16, model_folder=str(model_folder)
        )
        servers: Any = controls if served is None else served
        publishers.append(WeightPublisher(servers, transport, calls, timeout_s=5.0, prove=prove))
        return publishers[-1]

    yield build
    for publisher in publishers:
        publisher.close()


def kinds(control: FakeControl) -> list[str]:
    return ["delta" if update["is_delta"] else "full" for update in control.updates]


def test_consecutive_versions_arrive_bit_for_bit_and_all_as_deltas(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    publisher = connect()

    for version in range(4):
        assert publisher.publish(version, the_weights(version).items()).failed == ()
        for control in controls:
            assert as_bfloat16(control.weights) == as_bfloat16(the_weights(version))
            assert control.version == str(version)

    # The first too: its base is what the servers were started with.
    assert kinds(controls[0]) == kinds(controls[1]) == ["delta"] * 4


def test_a_server_that_was_restarted_gets_the_whole_version_and_then_deltas_again(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    publisher = connect()
    publisher.publish(0, the_weights(0).items())
    publisher.publish(1, the_weights(1).items())
    controls[1].restart()

    publisher.ensure_current(1, the_weights(1).items())
    publisher.publish(2, the_weights(2).items())

    assert kinds(controls[0]) == ["delta"] * 3
    assert kinds(controls[1]) == ["delta", "delta", "full", "delta"]
    assert as_bfloat16(controls[1].weights) == as_bfloat16(the_weights(2))


def test_a_wrong_base_is_refused_and_healed_by_the_whole_version(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl], caplog: pytest.LogCaptureFixture
) -> None:
    publisher = connect()
    publisher.publish(1, the_weights(1).items())
    controls[0].receiver._version = "impostor"  # it reports 1 and holds something else

    result = publisher.publish(2, the_weights(2).items())

    assert result.failed == ()
    assert kinds(controls[0]) == ["delta", "delta", "full"]
    assert "the delta's base is version '1', held is version 'impostor'" in caplog.text
    assert as_bfloat16(controls[0].weights) == as_bfloat16(the_weights(2))
    # The other had the delta already, and is not sent anything twice.
    assert kinds(controls[1]) == ["delta", "delta"]


def test_weights_that_only_claim_to_be_the_base_are_refused_and_healed(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl], caplog: pytest.LogCaptureFixture
) -> None:
    publisher = connect()
    publisher.publish(1, the_weights(1).items())
    held = controls[0].receiver._tensors
    assert held is not None
    held["embed"][0, 0] += 1

    assert publisher.publish(2, the_weights(2).items()).failed == ()

    assert "'embed' comes out with another checksum" in caplog.text
    assert as_bfloat16(controls[0].weights) == as_bfloat16(the_weights(2))


def test_a_server_that_did_not_prove_its_version_gets_the_whole_of_it(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    doubted = [controls[1].url]

    def prove(control: EngineControl, version: str) -> None:
        if control.url in doubted:
            doubted.remove(control.url)
            raise ServerSyncError(control.url, Edge.VERIFY, f"its logprobs are not those of version {version}")

    publisher = connect(prove=prove)
    publisher.publish(1, the_weights(1).items())

    assert publisher.ensure_current(1, the_weights(1).items()).failed == ()

    assert (kinds(controls[0]), kinds(controls[1])) == (["delta"], ["delta", "full"])


def test_a_new_trainer_brings_its_first_version_whole(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    connect().publish(7, the_weights(7).items())

    connect().publish(8, the_weights(8).items())

    assert kinds(controls[0]) == ["delta", "full"]
    assert as_bfloat16(controls[0].weights) == as_bfloat16(the_weights(8))


def damage_last_byte(update: dict[str, Any]) -> None:
    path = Path(update["path"])
    path = path if path.is_file() else path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_in_half(update: dict[str, Any]) -> None:
    path = Path(update["path"])
    path = path if path.is_file() else path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [damage_last_byte, cut_in_half])
def test_files_damaged_on_their_way_never_reach_the_model(
    connect: Callable[..., WeightPublisher],
    controls: list[FakeControl],
    damage: Callable[[dict[str, Any]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = controls[0]
    publisher = connect([control])
    publisher.publish(1, the_weights(1).items())
    control.before_update = damage

    with pytest.raises(WeightSyncError, match="truncated or corrupt"):
        publisher.publish(2, the_weights(2).items())

    assert kinds(control) == ["delta", "delta", "full"]
    assert "attempt 1: inference server http://one failed to send: these weights are truncated" in caplog.text
    assert as_bfloat16(control.weights) == as_bfloat16(the_weights(1))
    assert (control.version, control.is_standing_still) == ("1", False)
    control.before_update = lambda _: None
    publisher.publish(3, the_weights(3).items())
    assert as_bfloat16(control.weights) == as_bfloat16(the_weights(3))


def test_an_engine_that_fails_to_load_half_way_goes_back_to_its_old_weights(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    control = controls[0]
    publisher = connect([control])
    publisher.publish(1, the_weights(1).items())

    def refuse_new(tensors: Mapping[str, torch.Tensor]) -> None:
        if as_bfloat16(dict(tensors)) != as_bfloat16(the_weights(1)):
            raise RuntimeError("no such layer")

    control.before_load = refuse_new
    with pytest.raises(WeightSyncError, match="no such layer"):
        publisher.publish(2, the_weights(2).items())

    assert as_bfloat16(control.weights) == as_bfloat16(the_weights(1))
    control.before_load = lambda _: None
    publisher.publish(3, the_weights(3).items())
    assert as_bfloat16(control.weights) == as_bfloat16(the_weights(3))


def test_before_the_first_version_it_goes_back_to_its_model_folder(model_folder: Path) -> None:
    control = FakeControl("http://one", model_folder)

    def fail_once(_: Mapping[str, torch.Tensor]) -> None:
        control.before_load = lambda _: None
        raise RuntimeError("no such layer")

    control.before_load = fail_once
    versions = files.VersionFolders(model_folder.parent / "w", keep=2)
    path = write_full(versions, the_weights(1), version="1", dtype=torch.bfloat16)

    with pytest.raises(RuntimeError, match="no such layer"):
        control.receiver.receive(path, version="1", is_delta=False)

    assert as_bfloat16(control.weights) == as_bfloat16(the_weights(0))


def test_an_engine_without_its_model_folder_needs_the_first_version_whole(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl], tmp_path: Path
) -> None:
    controls[0].model_folder = tmp_path / "nowhere"
    controls[0].restart()
    publisher = connect()

    assert publisher.publish(1, the_weights(1).items()).failed == ()
    assert publisher.publish(2, the_weights(2).items()).failed == ()

    assert kinds(controls[0]) == ["delta", "full", "delta"]
    assert as_bfloat16(controls[0].weights) == as_bfloat16(the_weights(2))


def test_no_delta_fits_an_engine_that_could_not_go_back(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    control = controls[0]
    connect([control]).publish(1, the_weights(1).items())
    path = Path(control.updates[0]["path"])

    def fail(_: Mapping[str, torch.Tensor]) -> None:
        raise RuntimeError("no such layer")

    control.before_load = fail
    publisher = connect([control])
    with pytest.raises(WeightSyncError):
        publisher.publish(2, the_weights(2).items())

    with pytest.raises(DeltaBaseError, match="held is version None"):
        control.receiver.receive(path, version="1", is_delta=True)


def test_what_the_trainer_changes_after_publishing_does_not_change_the_base(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    publisher = connect()
    live = {name: tensor.bfloat16() for name, tensor in the_weights(1).items()}
    publisher.publish(1, live.items())
    for tensor in live.values():
        tensor.mul_(1.5)

    assert publisher.publish(2, live.items()).failed == ()

    assert as_bfloat16(controls[0].weights) == as_bfloat16(live)
    assert kinds(controls[0]) == ["delta", "delta"]


def test_foreign_weights_are_refused_before_a_server_hears_of_them(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl]
) -> None:
    with pytest.raises(ForeignWeightsError, match="'norm'"):
        connect().publish(1, (the_weights(1) | {"norm": torch.zeros(9)}).items())

    assert controls[0].updates == []


def test_a_full_disk_costs_a_version_and_nothing_else(
    connect: Callable[..., WeightPublisher], controls: list[FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = connect()
    publisher.publish(1, the_weights(1).items())
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage("/")._replace(free=100)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DiskFullError):
            publisher.publish(2, the_weights(2).items())
    assert controls[0].version == "1"

    publisher.publish(3, the_weights(3).items())

    assert as_bfloat16(controls[0].weights) == as_bfloat16(the_weights(3))
    assert kinds(controls[0]) == ["delta", "delta"]  # from 1 to 3


def test_only_the_newest_files_stay(connect: Callable[..., WeightPublisher], tmp_path: Path) -> None:
    publisher = connect()

    for version in range(5):
        publisher.publish(version, the_weights(version).items())

    deltas = tmp_path / "weights" / "deltas"
    assert sorted(path.name for path in deltas.iterdir()) == ["v3", "v4"]
    assert not (tmp_path / "weights" / "full").exists()  # nobody needed one


def test_a_whole_version_under_another_name_is_refused(model_folder: Path, tmp_path: Path) -> None:
    path = write_full(files.VersionFolders(tmp_path / "w", keep=2), the_weights(1), version="1", dtype=torch.bfloat16)
    control = FakeControl("http://one", model_folder)

    with pytest.raises(DeltaCorruptError, match="holds version '1' instead of '2'"):
        control.receiver.receive(path, version="2", is_delta=False)
    assert control.weights == {}


def test_a_whole_version_that_is_still_being_written_is_waited_for_and_not_written_twice(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()
    writes: list[str] = []

    def slow(*args: Any, **options: Any) -> Path:
        writes.append(options["version"])
        written.wait(20)
        return tmp_path / "v1"

    monkeypatch.setattr(delta, "write_full", slow)
    transport = DeltaTransport(
        ThreadPoolExecutor(1), folder=tmp_path / "w", keep=2, dtype=torch.bfloat16, model_folder=str(model_folder)
    )
    transport.prepare(the_weights(1).items(), "1")
    stranger: Any = FakeControl("http://one", model_folder)
    members = [Member(stranger, 1, "of another trainer")]
    abandoned = threading.Thread(target=transport.open, args=(members,), kwargs={"timeout_s": 20.0})
    abandoned.start()
    while not writes:
        time.sleep(0.005)

    with pytest.raises(TransferError, match="still being written"):
        transport.open(members, timeout_s=0.01)
    written.set()
    abandoned.join()
    transport.open(members, timeout_s=5)

    assert writes == ["1"]
