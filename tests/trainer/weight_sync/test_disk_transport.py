"""Weights over a shared disk, to FAKE engines that load the folder they are told to, or refuse."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.fakes import tiny_llama
from trainer.weight_sync.engines.control import UNKNOWN_VERSION, EngineControl, EngineName
from trainer.weight_sync.errors import (
    CorruptWeightsError,
    DiskFullError,
    ForeignWeightsError,
    ServerSyncError,
    TransferError,
    WeightSyncError,
)
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.states import Edge
from trainer.weight_sync.transports.base import Member
from trainer.weight_sync.transports.disk import DiskTransport, companions, local_model_folder, of_this_model


class FakeEngine:
    """FAKE: a server in memory. `faults` are raised by the next loads, one each; None lets one pass."""

    engine: EngineName = "vllm"

    def __init__(self, name: str = "a", version: str = UNKNOWN_VERSION) -> None:
        self.url = f"http://{name}:1"
        self.version = version
        self.weights: dict[str, torch.Tensor] = {}
        self.loads: list[str] = []
        self.faults: list[str | None] = []
        self.load_s = 0.0
        self.calls: list[str] = []
        self.paused = False

    def load_folder(self, folder: str, weight_version: str, *, timeout_s: float) -> None:
        self.loads.append(Path(folder).name)
        time.sleep(self.load_s)
        if self.faults and (fault := self.faults.pop(0)):
            raise ServerSyncError(self.url, Edge.SEND, fault)
        self.weights = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            self.weights |= load_file(path)
        self.version = weight_version

    def health(self, *, timeout_s: float) -> None:
        pass

    def world_size(self, *, timeout_s: float) -> int:
        return 1

    def is_paused(self, *, timeout_s: float) -> bool:
        return self.paused

    def pause(self, mode: str, *, recompute: bool, timeout_s: float) -> None:
        self.paused = True

    def resume(self, *, timeout_s: float) -> None:
        self.paused = False

    def weight_version(self, *, timeout_s: float) -> str:
        return self.version

    def reset_prefix_cache(self, *, recompute: bool, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        pass


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny Llama with tied embeddings, as it is saved, and what else lies in such folders."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    for name in ("tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "README.md", ".gitattributes"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def weights(model_folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor + 1 for name, tensor in load_file(model_folder / "model.safetensors").items()}


@pytest.fixture
def transport(tmp_path: Path, model_folder: Path, calls: ThreadPoolExecutor) -> DiskTransport:
    return a_transport(calls, tmp_path, model_folder)


def a_transport(calls: ThreadPoolExecutor, tmp_path: Path, model_folder: Path, **options: Any) -> DiskTransport:
    return DiskTransport(
        calls, folder=tmp_path / "weights", keep=2, dtype=torch.bfloat16, model_folder=str(model_folder), **options
    )


def members(*engines: FakeEngine) -> list[Member]:
    return [Member(cast(EngineControl, engine), 1, engine.version) for engine in engines]


def converted(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}


def runs(engine: FakeEngine, weights: dict[str, torch.Tensor]) -> bool:
    expected = converted(weights)
    return engine.weights.keys() == expected.keys() and all(
        torch.equal(engine.weights[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("shard_bytes", [2**20, 700])
def test_every_server_loads_what_was_published(
    tmp_path: Path,
    model_folder: Path,
    calls: ThreadPoolExecutor,
    weights: dict[str, torch.Tensor],
    shard_bytes: int,
) -> None:
    transport = a_transport(calls, tmp_path, model_folder, shard_bytes=shard_bytes)
    engines = [FakeEngine("a"), FakeEngine("b")]
    transport.open(members(*engines), timeout_s=5)

    transport.send(transport.prepare(iter(weights.items()), "3"), timeout_s=5)

    assert [engine.version for engine in engines] == ["3", "3"]
    assert all(runs(engine, weights) for engine in engines)


def test_the_folder_is_a_model_that_transformers_loads_with_its_output_layer_tied(
    transport: DiskTransport, weights: dict[str, torch.Tensor]
) -> None:
    from transformers import AutoModelForCausalLM

    shipment = transport.prepare(weights.items(), "1")

    model = AutoModelForCausalLM.from_pretrained(shipment.folder, dtype=torch.bfloat16)
    assert "lm_head.weight" not in weights
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"].to(torch.bfloat16))
    assert (shipment.folder / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (shipment.folder / "pytorch_model.bin").exists()


def test_companions_are_all_but_weights_and_papers(model_folder: Path) -> None:
    names = companions(model_folder)

    assert names == ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": torch.zeros(7)}, r"'model.norm.weight' has shape \[7\] instead of \[16\]"),
        ({"base_model.model.x.lora_A.weight": torch.zeros(7)}, "lora_A.weight' is unknown"),
        ({"lm_head.weight": torch.zeros(32, 16)}, "'lm_head.weight' is unknown"),
    ],
)
def test_weights_of_another_model_never_reach_the_disk(
    transport: DiskTransport, weights: dict[str, torch.Tensor], change: dict[str, torch.Tensor], message: str
) -> None:
    old = transport.prepare(weights.items(), "1")

    with pytest.raises(ForeignWeightsError, match=message):
        transport.prepare((weights | change).items(), "2")

    assert [path.name for path in old.folder.parent.iterdir()] == ["v1"]


def test_tensors_that_servers_keep_are_named_in_the_log(
    transport: DiskTransport, weights: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    del weights["model.norm.weight"]

    with caplog.at_level(logging.WARNING):
        transport.prepare(weights.items(), "1")

    assert "servers keep what they have of 1 tensors that are not published: model.norm.weight" in caplog.text


def test_a_model_folder_without_safetensors_cannot_be_compared_with(weights: dict[str, torch.Tensor]) -> None:
    assert dict(of_this_model(weights.items(), {}, Path("model"))).keys() == weights.keys()


def test_a_file_that_was_changed_is_named_and_no_server_is_told(
    transport: DiskTransport, weights: dict[str, torch.Tensor]
) -> None:
    engine = FakeEngine()
    transport.open(members(engine), timeout_s=5)
    shipment = transport.prepare(weights.items(), "1")
    content = bytearray((shipment.folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (shipment.folder / "model.safetensors").write_bytes(content)

    with pytest.raises(CorruptWeightsError, match=r"v1/model.safetensors has checksum"):
        transport.send(shipment, timeout_s=5)

    assert engine.loads == []


def test_a_version_that_vanished_is_named(transport: DiskTransport, weights: dict[str, torch.Tensor]) -> None:
    transport.open(members(FakeEngine()), timeout_s=5)
    shipment = transport.prepare(weights.items(), "1")
    shutil.rmtree(shipment.folder)

    with pytest.raises(CorruptWeightsError, match="is missing"):
        transport.send(shipment, timeout_s=5)


def test_a_server_that_broke_off_loads_what_it_had_until_two_loads_in_a_row_succeed(
    transport: DiskTransport, weights: dict[str, torch.Tensor], model_folder: Path
) -> None:
    engine = FakeEngine()
    engine.faults = ["it broke off", "left-overs"]
    transport.open(members(engine), timeout_s=5)

    with pytest.raises(TransferError, match="failed to send: it broke off; it runs version default again") as caught:
        transport.send(transport.prepare(weights.items(), "1"), timeout_s=5)

    assert engine.loads == ["v1", "model", "model", "model"]
    assert engine.version == UNKNOWN_VERSION
    assert caught.value.culprits.keys() == {engine.url}


def test_it_goes_back_to_the_last_version_when_it_had_one(
    transport: DiskTransport, weights: dict[str, torch.Tensor]
) -> None:
    engine = FakeEngine()
    transport.open(members(engine), timeout_s=5)
    transport.send(transport.prepare(weights.items(), "1"), timeout_s=5)
    transport.open(members(engine), timeout_s=5)
    engine.faults = ["it broke off"]

    with pytest.raises(TransferError, match="it runs version 1 again"):
        transport.send(transport.prepare({n: t + 1 for n, t in weights.items()}.items(), "2"), timeout_s=5)

    assert engine.loads == ["v1", "v2", "v1", "v1"]
    assert runs(engine, weights)


def test_a_server_that_cannot_go_back_is_to_be_restarted(
    transport: DiskTransport, weights: dict[str, torch.Tensor]
) -> None:
    engine = FakeEngine()
    engine.faults = ["it broke off", "still broken", "broken for good", "broken for good"]
    transport.open(members(engine), timeout_s=5)

    with pytest.raises(
        TransferError, match=r"could not go back to version default either \(broken for good\): restart it"
    ):
        transport.send(transport.prepare(weights.items(), "1"), timeout_s=5)


def test_no_load_begins_when_nobody_waits_for_it_any_more(
    transport: DiskTransport, weights: dict[str, torch.Tensor], calls: ThreadPoolExecutor
) -> None:
    engine = FakeEngine()
    engine.faults = ["timed out"]
    engine.load_s = 0.15
    transport.open(members(engine), timeout_s=5)
    shipment = transport.prepare(weights.items(), "1")

    with pytest.raises(TransferError, match=engine.url):
        transport.send(shipment, timeout_s=0.05)
    calls.shutdown()

    assert engine.loads == ["v1"]


def test_sglang_brings_itself_back(transport: DiskTransport, weights: dict[str, torch.Tensor]) -> None:
    engine = FakeEngine()
    engine.engine = "sglang"
    engine.faults = ["rolled back"]
    transport.open(members(engine), timeout_s=5)

    with pytest.raises(TransferError, match="rolled back; it runs version default as before"):
        transport.send(transport.prepare(weights.items(), "1"), timeout_s=5)

    assert engine.loads == ["v1"]


def test_another_attempt_passes_over_the_servers_that_have_the_version(
    transport: DiskTransport, weights: dict[str, torch.Tensor]
) -> None:
    good, bad, reborn = FakeEngine("good"), FakeEngine("bad"), FakeEngine("reborn")
    bad.faults = ["busy"]
    transport.open(members(good, bad, reborn), timeout_s=5)
    shipment = transport.prepare(weights.items(), "1")
    with pytest.raises(TransferError):
        transport.send(shipment, timeout_s=5)
    reborn.version = UNKNOWN_VERSION  # restarted meanwhile

    transport.leave()
    transport.open(members(good, bad, reborn), timeout_s=5)
    transport.send(shipment, timeout_s=5)

    assert [engine.loads.count("v1") for engine in (good, bad, reborn)] == [1, 2, 2]
    assert {good.version, bad.version, reborn.version} == {"1"}


def test_the_same_version_with_other_weights_is_loaded_again(
    transport: DiskTransport, weights: dict[str, torch.Tensor]
) -> None:
    engine = FakeEngine()
    for added in (0, 1):
        transport.open(members(engine), timeout_s=5)
        transport.send(transport.prepare({n: t + added for n, t in weights.items()}.items(), "1"), timeout_s=5)

    assert runs(engine, {name: tensor + 1 for name, tensor in weights.items()})


def test_a_full_disk_ends_the_publication_before_any_pause(
    tmp_path: Path,
    model_folder: Path,
    calls: ThreadPoolExecutor,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    transport = a_transport(calls, tmp_path, model_folder)
    publisher = WeightPublisher([cast(EngineControl, engine)], transport, calls, timeout_s=5)
    assert publisher.publish(1, weights.items()).failed == ()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))

    with pytest.raises(DiskFullError, match="100 are free"):
        publisher.publish(2, weights.items())

    assert (engine.version, engine.paused) == ("1", False)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["v1"]


def test_a_corrupt_file_found_in_a_publication_leaves_servers_resumed_with_the_old_weights(
    tmp_path: Path, model_folder: Path, calls: ThreadPoolExecutor, weights: dict[str, torch.Tensor]
) -> None:
    engine = FakeEngine()
    transport = a_transport(calls, tmp_path, model_folder)
    pause = engine.pause

    def pause_and_corrupt(*args: Any, **options: Any) -> None:
        pause(*args, **options)
        with (tmp_path / "weights/v1/model.safetensors").open("r+b") as file:
            file.truncate(50)

    engine.pause = pause_and_corrupt  # type: ignore[method-assign]
    publisher = WeightPublisher([cast(EngineControl, engine)], transport, calls, timeout_s=5)

    with pytest.raises(CorruptWeightsError, match="has 50 bytes instead of"):
        publisher.publish(1, weights.items())

    assert (engine.version, engine.paused, engine.loads) == (UNKNOWN_VERSION, False, [])


@pytest.mark.parametrize("name", ["no/such/model", "not a name at all!"])
def test_a_model_that_is_not_on_this_machine_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightSyncError, match=f"model '{name}' is neither a folder nor in the Hub's cache"):
        local_model_folder(name)


def test_a_model_in_the_cache_of_the_hub_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: list[Callable[..., str]] = []

    def from_cache(name: str, *, local_files_only: bool) -> str:
        assert local_files_only
        seen.append(from_cache)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)

    assert local_model_folder("org/model") == tmp_path / "org/model"


def test_tensors_of_several_files_are_compared(tmp_path: Path, calls: ThreadPoolExecutor, model_folder: Path) -> None:
    shards = sorted(load_file(model_folder / "model.safetensors").items())
    (model_folder / "model.safetensors").unlink()
    save_file(dict(shards[:5]), model_folder / "model-00001-of-00002.safetensors")
    save_file(dict(shards[5:]), model_folder / "model-00002-of-00002.safetensors")

    shipment = a_transport(calls, tmp_path, model_folder).prepare(iter(shards), "1")

    assert load_file(shipment.folder / "model.safetensors").keys() == dict(shards).keys()
