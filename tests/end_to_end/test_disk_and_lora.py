"""What the disk and LoRA transports promise, with a real vLLM and a real model."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.end_to_end.conftest import MODEL, PROMPT, Weights, running_vllm
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import CorruptWeightsError, ForeignWeightsError, WeightSyncError
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.transports.base import Transport
from trainer.weight_sync.transports.disk import DiskShipment, DiskTransport
from trainer.weight_sync.transports.lora import LoraTransport

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LAYERS, WIDTH, HIDDEN = 30, 576, 1536
MAX_RANK = 16
SECOND_FILE = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM that takes adapters. Prompts cannot be scored there: with LoRA the CPU build dies of prompt_logprobs."""
    log_path = tmp_path_factory.mktemp("vllm") / "server.log"
    with running_vllm(log_path, lora=True, max_lora_rank=MAX_RANK) as vllm:
        yield vllm.url


@pytest.fixture
def calls() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as calls:
        yield calls


def a_publisher(control: VllmControl, transport: Transport[Any], calls: ThreadPoolExecutor) -> WeightPublisher:
    return WeightPublisher([control], transport, calls, timeout_s=60)


def to_disk(calls: ThreadPoolExecutor, folder: Path, kind: type[DiskTransport] = DiskTransport) -> DiskTransport:
    return kind(
        calls,
        folder=folder,
        keep=2,
        dtype=torch.bfloat16,
        model_folder=str(MODEL),
        shard_bytes=100 * 2**20,
    )


def an_adapter(seed: int, *, rank: int = 8) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)}.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = 0.02 * torch.randn(rank, columns, generator=generator)
            weights[f"{name}.lora_B.weight"] = 0.02 * torch.randn(rows, rank, generator=generator)
    return weights


def adapters(calls: ThreadPoolExecutor, folder: Path, *, rank: int = 8) -> LoraTransport:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(MODEL),
        "r": rank,
        "lora_alpha": 16,
        "target_modules": {"q_proj", "down_proj"},
    }
    return LoraTransport(calls, folder=folder, keep=2, adapter_name="policy", adapter_config=config)


def generate(url: str, *, model: str = MODEL.name, max_tokens: int = 8, **sampling: Any) -> dict[str, Any]:
    body = {
        "token_ids": PROMPT,
        "model": model,
        "sampling_params": {"max_tokens": max_tokens, "temperature": 0, "logprobs": 0, **sampling},
    }
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=180).raise_for_status().json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def logprobs(url: str, model: str = MODEL.name) -> list[float]:
    return [token["logprob"] for token in generate(url, model=model)["logprobs"]["content"]]


def differ(some: list[float], others: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(some, others, strict=True)) > 0.05


def is_paused(url: str) -> bool:
    return VllmControl(url).is_paused(timeout_s=20)


def reported(url: str) -> str:
    return VllmControl(url).weight_version(timeout_s=20)


def test_the_logprobs_become_those_of_the_folder_and_go_back(
    server: str, tmp_path: Path, calls: ThreadPoolExecutor, original: Weights, changed: Weights
) -> None:
    from transformers import AutoModelForCausalLM

    before = logprobs(server)
    publisher = a_publisher(VllmControl(server), to_disk(calls, tmp_path), calls)

    publisher.publish(1, changed.items())
    sampled = generate(server)
    publisher.publish(2, original.items())

    token_ids = torch.tensor([[*PROMPT, *sampled["token_ids"]]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v1", dtype=torch.bfloat16)
    with torch.no_grad():
        logprobs_TV = model(token_ids).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    expected = logprobs_TV.gather(1, token_ids[0, len(PROMPT) :, None]).squeeze(1).tolist()
    found = [token["logprob"] for token in sampled["logprobs"]["content"]]
    assert differ(found, before)
    assert found == pytest.approx(expected, abs=0.15)  # two bfloat16 implementations
    assert logprobs(server) == before
    assert reported(server) == "2"


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x55" * 100)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class DamagedOnTheWay(DiskTransport):
    """Something writes to the folder when the version is there and servers are paused."""

    damage: Callable[[Path], None]

    def send(self, shipment: DiskShipment, *, timeout_s: float) -> None:
        self.damage(shipment.folder / SECOND_FILE)
        super().send(shipment, timeout_s=timeout_s)


@pytest.mark.parametrize("damage", [_flip, _truncate])
def test_a_damaged_file_is_named_before_a_server_reads_it(
    server: str,
    tmp_path: Path,
    calls: ThreadPoolExecutor,
    original: Weights,
    changed: Weights,
    damage: Callable[[Path], None],
) -> None:
    a_publisher(VllmControl(server), to_disk(calls, tmp_path), calls).publish(3, original.items())
    before = logprobs(server)
    transport = to_disk(calls, tmp_path, DamagedOnTheWay)
    transport.damage = damage  # type: ignore[attr-defined]

    with pytest.raises(CorruptWeightsError, match=f"{SECOND_FILE} has"):
        a_publisher(VllmControl(server), transport, calls).publish(4, changed.items())

    assert not is_paused(server)
    assert (reported(server), logprobs(server)) == ("3", before)


class SeesAnotherDisk(VllmControl):
    """Its server finds a version damaged that is whole where the trainer looks."""

    damaged: str = ""

    def load_folder(self, folder: str, weight_version: str, *, timeout_s: float) -> None:
        if weight_version == self.damaged:
            copy = Path(folder).with_name("copy")
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            _truncate(copy / SECOND_FILE)
            folder = str(copy)
        super().load_folder(folder, weight_version, timeout_s=timeout_s)


def test_a_server_that_breaks_off_in_the_middle_goes_back_to_the_weights_it_had(
    server: str, tmp_path: Path, calls: ThreadPoolExecutor, original: Weights, changed: Weights
) -> None:
    control = SeesAnotherDisk(server)
    publisher = a_publisher(control, to_disk(calls, tmp_path), calls)
    publisher.publish(5, changed.items())
    before = logprobs(server)
    control.damaged = "6"

    with pytest.raises(WeightSyncError, match=f"{server} failed to send: .* it runs version 5 again"):
        publisher.publish(6, original.items())

    assert (is_paused(server), reported(server), logprobs(server)) == (False, "5", before)
    assert publisher.publish(7, original.items()).failed == ()
    assert differ(logprobs(server), before)


def test_weights_of_another_model_never_reach_a_server(
    server: str, tmp_path: Path, calls: ThreadPoolExecutor, original: Weights
) -> None:
    publisher = a_publisher(VllmControl(server), to_disk(calls, tmp_path), calls)
    publisher.publish(8, original.items())
    before = logprobs(server)
    foreign = {**original, "model.layers.20.self_attn.k_proj.weight": torch.zeros(7, 7)}

    with pytest.raises(ForeignWeightsError, match=r"k_proj.weight' has shape \[7, 7\] instead of \[192, 576\]"):
        publisher.publish(9, foreign.items())

    assert not is_paused(server)
    assert (reported(server), logprobs(server)) == ("8", before)


def test_an_adapter_changes_the_logprobs_under_its_name_and_the_next_one_changes_them_again(
    server: str, tmp_path: Path, calls: ThreadPoolExecutor
) -> None:
    base = logprobs(server)
    publisher = a_publisher(VllmControl(server), adapters(calls, tmp_path), calls)

    publisher.publish(20, an_adapter(1).items())
    first = logprobs(server, "policy")
    publisher.publish(21, an_adapter(2).items())
    second = logprobs(server, "policy")
    publisher.publish(22, an_adapter(1).items())

    assert differ(first, base)
    assert differ(second, first)
    assert logprobs(server, "policy") == first
    assert logprobs(server) == base
    assert reported(server) == "22"


def test_an_adapter_of_too_high_a_rank_is_refused_with_the_fix_and_the_last_one_stays(
    server: str, tmp_path: Path, calls: ThreadPoolExecutor
) -> None:
    a_publisher(VllmControl(server), adapters(calls, tmp_path), calls).publish(23, an_adapter(3).items())
    before = logprobs(server, "policy")
    publisher = a_publisher(VllmControl(server), adapters(calls, tmp_path, rank=64), calls)

    with pytest.raises(WeightSyncError, match=f"{server} failed to send: .*start it with --max-lora-rank 64") as caught:
        publisher.publish(24, an_adapter(4, rank=64).items())

    assert f"train with lora_r of at most {MAX_RANK}" in str(caught.value)
    assert not is_paused(server)
    assert (reported(server), logprobs(server, "policy")) == ("23", before)


def test_a_completion_in_flight_goes_on_with_the_new_adapter_and_outlives_the_folder_that_it_began_with(
    server: str, tmp_path: Path, calls: ThreadPoolExecutor
) -> None:
    publisher = a_publisher(VllmControl(server), adapters(calls, tmp_path), calls)
    publisher.publish(25, an_adapter(1).items())
    with ThreadPoolExecutor() as requests:
        in_flight = requests.submit(generate, server, model="policy", max_tokens=300, ignore_eos=True)
        time.sleep(1.0)
        publisher.publish(26, an_adapter(2).items())
        shutil.rmtree(tmp_path / "v25")
        choice = in_flight.result()

    assert choice["finish_reason"] == "length"
    assert [span["version"] for span in choice["weight_versions"]] == ["25", "26"]
    assert differ(logprobs(server, "policy"), logprobs(server))
