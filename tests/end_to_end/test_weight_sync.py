"""What weight sync promises, with a real vLLM and a real model."""

from __future__ import annotations

import itertools
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from tests.end_to_end.conftest import MODEL, PROMPT, VllmProcess, Weights
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect
from trainer.weight_sync.engines.control import PauseMode
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import WeightSyncError
from trainer.weight_sync.publisher import WeightPublisher
from trainer.weight_sync.transports import gloo_group

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture
def publisher(vllm_server: str) -> Iterator[WeightPublisher]:
    publisher = connect([vllm_server], WeightSyncConfig(timeout_s=60))
    yield publisher
    publisher.close()


def generate(url: str, *, max_tokens: int = 8, **sampling: Any) -> dict[str, Any]:
    body = {
        "token_ids": PROMPT,
        "sampling_params": {"max_tokens": max_tokens, "temperature": 0, "logprobs": 0, **sampling},
    }
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=180).raise_for_status().json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def logprobs(url: str) -> list[float]:
    return [token["logprob"] for token in generate(url)["logprobs"]["content"]]


def is_paused(url: str) -> bool:
    return VllmControl(url).is_paused(timeout_s=20)


def running(metrics: str) -> bool:
    values = [line.split()[-1] for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
    return sum(map(float, values)) > 0


@pytest.fixture
def half_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Do something in the middle of the next transfer, once."""

    def arrange(action: Callable[[], None]) -> None:
        broadcast, numbers = gloo_group.broadcast, itertools.count(1)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) == 3:
                action()
            return broadcast(*args, **kwargs)

        monkeypatch.setattr(gloo_group, "broadcast", watched)

    return arrange


def test_publishing_changes_the_logprobs_and_publishing_the_old_weights_restores_them(
    vllm_server: str, publisher: WeightPublisher, original: Weights, changed: Weights
) -> None:
    before = logprobs(vllm_server)

    result = publisher.publish(1, changed.items())
    between = logprobs(vllm_server)
    restored = publisher.publish(2, original.items())

    assert [server.weight_version for server in (*result.servers, *restored.servers)] == ["1", "2"]
    assert max(abs(a - b) for a, b in zip(before, between, strict=True)) > 0.05
    assert logprobs(vllm_server) == before


def test_the_logprobs_are_those_of_the_published_weights(
    vllm_server: str, publisher: WeightPublisher, changed: Weights
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    model.load_state_dict(changed, strict=False)
    publisher.publish(3, changed.items())

    sampled = generate(vllm_server)

    token_ids = torch.tensor([[*PROMPT, *sampled["token_ids"]]])
    with torch.no_grad():
        logprobs_TV = model(token_ids).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    ours = logprobs_TV.gather(1, token_ids[0, len(PROMPT) :, None]).squeeze(1).tolist()
    theirs = [token["logprob"] for token in sampled["logprobs"]["content"]]
    differences = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    # Two bfloat16 implementations. An output layer of older weights is further off.
    assert statistics.mean(differences) < 0.05


def test_requests_in_flight_survive_and_say_which_version_sampled_which_token(
    vllm_server: str, publisher: WeightPublisher, original: Weights, changed: Weights
) -> None:
    publisher.publish(4, original.items())
    with ThreadPoolExecutor() as requests:
        in_flight = [
            requests.submit(generate, vllm_server, max_tokens=200, temperature=1.0, seed=seed, ignore_eos=True)
            for seed in range(4)
        ]
        with httpx.Client(timeout=10) as http:
            while "vllm:generation_tokens_total" not in http.get(f"{vllm_server}/metrics").text:
                time.sleep(0.05)
        time.sleep(1.0)
        publisher.publish(5, changed.items())
        choices = [future.result() for future in in_flight]

    for choice in choices:
        spans = choice["weight_versions"]
        assert [span["version"] for span in spans] == ["4", "5"]
        assert (spans[0]["start"], spans[1]["end"]) == (0, 200)
        assert spans[0]["end"] == spans[1]["start"] > 0
        assert choice["finish_reason"] == "length"
        assert len(choice["token_ids"]) == 200


def test_a_paused_engine_keeps_prompts_waiting(vllm_server: str) -> None:
    """Why a server can be asked for a proof only after it was resumed."""
    control = VllmControl(vllm_server)
    with ThreadPoolExecutor() as requests:
        control.pause("keep", timeout_s=20)
        waiting = requests.submit(generate, vllm_server)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1.0)
        control.resume(timeout_s=20)

        assert waiting.result()["token_ids"]


@pytest.mark.parametrize(("pause_mode", "timeout_s"), [("abort", 30.0), ("wait", 8.0)])
def test_requests_that_do_not_end_are_aborted_and_the_weights_arrive(
    vllm_server: str, original: Weights, pause_mode: PauseMode, timeout_s: float
) -> None:
    config = WeightSyncConfig(timeout_s=timeout_s, pause_mode=pause_mode)
    publisher = connect([vllm_server], config)
    with ThreadPoolExecutor() as requests, httpx.Client(timeout=10) as http:
        endless = requests.submit(generate, vllm_server, max_tokens=1000, ignore_eos=True)
        while not running(http.get(f"{vllm_server}/metrics").text):
            time.sleep(0.05)
        result = publisher.publish(100, original.items())

        assert result.failed == ()
        assert endless.result()["finish_reason"] == "abort"
    assert not is_paused(vllm_server)
    publisher.close()


def test_a_new_trainer_attaches_after_one_that_was_killed_while_sending(
    vllm_server: str, publisher: WeightPublisher, original: Weights
) -> None:
    publisher.publish(6, original.items())
    before = logprobs(vllm_server)
    first = textwrap.dedent(f"""
        import os, signal
        from safetensors.torch import load_file
        from trainer.weight_sync.config import WeightSyncConfig
        from trainer.weight_sync.connect import connect

        from trainer.weight_sync.transports import gloo_group

        broadcast, seen = gloo_group.broadcast, []

        def dying(*args, **kwargs):
            seen.append(1)
            if len(seen) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return broadcast(*args, **kwargs)

        gloo_group.broadcast = dying
        weights = load_file({str(MODEL / "model.safetensors")!r})
        connect([{vllm_server!r}], WeightSyncConfig(bucket_mib=8)).publish(7, [(n, t * 0) for n, t in weights.items()])
    """)
    assert subprocess.run([sys.executable, "-c", first], check=False).returncode == -signal.SIGKILL
    start = time.monotonic()
    assert is_paused(vllm_server)  # answered when the engine has given the dead trainer up
    assert time.monotonic() - start < 8

    second = connect([vllm_server], WeightSyncConfig(timeout_s=60))
    second.attach()

    assert not is_paused(vllm_server)
    assert logprobs(vllm_server) == before  # half a transfer changed nothing
    assert second.publish(8, original.items()).failed == ()
    assert logprobs(vllm_server) == before
    second.close()


def test_a_transfer_that_fails_half_way_leaves_the_old_weights_and_a_running_engine(
    vllm_server: str,
    publisher: WeightPublisher,
    original: Weights,
    changed: Weights,
    half_way: Callable[[Callable[[], None]], None],
) -> None:
    publisher.publish(9, original.items())
    before = logprobs(vllm_server)

    def fail() -> None:
        raise MemoryError("no room to send")

    half_way(fail)
    with pytest.raises(MemoryError):
        publisher.publish(10, changed.items())

    assert not is_paused(vllm_server)
    assert logprobs(vllm_server) == before
    assert publisher.publish(11, changed.items()).failed == ()


def test_weights_of_another_model_are_refused_and_the_engine_goes_on(
    vllm_server: str, publisher: WeightPublisher, original: Weights
) -> None:
    publisher.publish(12, original.items())
    before = logprobs(vllm_server)
    foreign = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8), "model.norm.weight": torch.zeros(8)}

    with pytest.raises(WeightSyncError, match="failed to send"):
        publisher.publish(13, foreign.items())

    assert not is_paused(vllm_server)
    assert logprobs(vllm_server) == before
    assert publisher.publish(14, original.items()).failed == ()


def test_a_server_killed_half_way_is_named_within_the_deadline_and_the_other_is_served(
    vllm_server: str,
    start_vllm: Callable[[], VllmProcess],
    changed: Weights,
    half_way: Callable[[Callable[[], None]], None],
) -> None:
    doomed = start_vllm()
    publisher = connect([vllm_server, doomed.url], WeightSyncConfig(timeout_s=30))
    assert publisher.publish(15, changed.items()).failed == ()
    start = time.monotonic()

    half_way(doomed.kill)
    result = publisher.publish(16, changed.items())

    assert time.monotonic() - start < 25
    (failed,) = result.failed
    assert failed.server == doomed.url
    assert doomed.url in str(failed.error)
    assert [server.weight_version for server in result.servers if server.error is None] == ["16"]
    assert not is_paused(vllm_server)
    publisher.close()
