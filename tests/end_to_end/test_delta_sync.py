"""What the delta transport promises, with a real vLLM: after each delta the very logprobs that a full reload gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.end_to_end.conftest import MODEL, PROMPT, Weights, running_vllm
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import WeightSyncError
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.transports.base import Transport
from trainer.weight_sync.transports.delta import DeltaTransport
from trainer.weight_sync.transports.delta_files import write_full
from trainer.weight_sync.transports.disk import DiskTransport
from trainer.weight_sync.transports.files import VersionFolders

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def delta_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_vllm(tmp_path_factory.mktemp("delta") / "server.log", weight_transfer="delta") as vllm:
        yield vllm.url


@pytest.fixture(scope="module")
def steps(original: Weights) -> list[Weights]:
    """Consecutive versions as a trainer holds them, in float32; each step moves every element by a learning rate."""
    generator = torch.Generator().manual_seed(0)
    versions = [original]
    for _ in range(3):
        last = versions[-1]
        versions.append(
            {name: last[name] + 2e-4 * torch.randn(last[name].shape, generator=generator).sign() for name in last}
        )
    return versions


@pytest.fixture
def publisher_over(delta_server: str, tmp_path: Path) -> Iterator[Callable[..., WeightPublisher]]:
    publishers: list[WeightPublisher] = []

    def build(transport_class: Any) -> WeightPublisher:
        calls = ThreadPoolExecutor(max_workers=4)
        transport: Transport[Any] = transport_class(
            calls,
            folder=tmp_path / transport_class.__name__,
            keep=2,
            dtype=torch.bfloat16,
            model_folder=str(MODEL),
        )
        publishers.append(WeightPublisher([VllmControl(delta_server)], transport, calls, timeout_s=TIMEOUT_S))
        return publishers[-1]

    yield build
    for publisher in publishers:
        publisher.close()


def logprobs(url: str) -> list[float]:
    body = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 16, "temperature": 0, "logprobs": 0}}
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=180).raise_for_status().json()
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


def name_version(url: str, version: str) -> None:
    httpx.post(f"{url}/update_weight_version", json={"new_version": version}, timeout=20).raise_for_status()


def test_three_versions_by_delta_give_the_logprobs_of_three_full_reloads(
    delta_server: str, publisher_over: Callable[..., WeightPublisher], steps: list[Weights], tmp_path: Path
) -> None:
    by_delta, by_reload = [], []

    publisher = publisher_over(DeltaTransport)
    for version, weights in enumerate(steps):
        assert publisher.publish(version, weights.items()).failed == ()
        by_delta.append(logprobs(delta_server))
    assert not (tmp_path / "DeltaTransport" / "full").exists()  # from the model folder on, all were deltas
    reload = publisher_over(DiskTransport)
    for version, weights in enumerate(steps):
        assert reload.publish(10 + version, weights.items()).failed == ()
        by_reload.append(logprobs(delta_server))

    assert by_delta == by_reload
    assert len({tuple(values) for values in by_delta}) == len(steps)


def test_a_wrong_base_is_refused_by_name_and_healed_by_the_whole_version(
    delta_server: str,
    publisher_over: Callable[..., WeightPublisher],
    steps: list[Weights],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = publisher_over(DeltaTransport), publisher_over(DeltaTransport)
    first.publish(20, steps[1].items())
    second.publish(21, steps[3].items())
    name_version(delta_server, "20")  # which it no longer holds

    assert first.publish(22, steps[2].items()).failed == ()

    assert "the delta's base is version '20', held is version '21'" in caplog.text
    healed = logprobs(delta_server)
    publisher_over(DiskTransport).publish(23, steps[2].items())
    assert logprobs(delta_server) == healed


def test_a_load_that_breaks_off_half_way_leaves_the_old_weights(
    delta_server: str, publisher_over: Callable[..., WeightPublisher], steps: list[Weights], tmp_path: Path
) -> None:
    publisher = publisher_over(DeltaTransport)
    publisher.publish(30, steps[1].items())
    before = logprobs(delta_server)
    # Names in order: most layers are loaded before this one.
    foreign = steps[2] | {"model.layers.9.self_attn.q_proj.weight": torch.zeros(8, 8)}
    path = write_full(VersionFolders(tmp_path / "foreign", keep=2), foreign, version="31", dtype=torch.bfloat16)
    control = VllmControl(delta_server)
    control.pause("keep", timeout_s=TIMEOUT_S)
    control.start_update(timeout_s=TIMEOUT_S)

    with pytest.raises(WeightSyncError, match="failed to send"):
        control.update_weights({"path": str(path), "version": "31", "is_delta": False}, timeout_s=TIMEOUT_S)

    control.reset_prefix_cache(timeout_s=TIMEOUT_S)
    control.resume(timeout_s=TIMEOUT_S)
    assert logprobs(delta_server) == before
    assert publisher.publish(32, steps[3].items()).failed == ()
    after = logprobs(delta_server)
    publisher_over(DiskTransport).publish(33, steps[3].items())
    assert logprobs(delta_server) == after
