"""Routing, retries and versions over one or several mock engines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig, ServerBaseline
from atroposlib.envs.server_handling.engines.samples import merge_runs, version_runs
from atroposlib.envs.server_handling.server_manager import ServerManager, server_list
from atroposlib.envs.server_handling.vllm_server import sampling_params
from atroposlib.errors import ConfigError, ModelServerError, RolloutError
from atroposlib.testing.mock_inference import MockInferenceServer


def reply(prompt: list[int], index: int) -> list[int]:
    return [50 + index, 2]


def manager_of(*engines: MockInferenceServer, timeout: int = 10) -> ServerManager:
    return ServerManager(
        [APIServerConfig(base_url=engine.url, server_type="vllm", timeout=timeout) for engine in engines]
    )


async def sample(manager: ServerManager, **kwargs: Any) -> Any:
    return await manager.sample_tokens(input_ids=[5, 6], max_tokens=4, **kwargs)


async def test_choices_come_in_order_with_logprobs_and_versions() -> None:
    async with MockInferenceServer(reply, weight_version="3") as engine:
        manager = manager_of(engine)
        samples = await sample(manager, n=3)
        await manager.close()

    assert samples.as_lists() == ([5, 6], [[50, 2], [51, 2], [52, 2]], [[-0.25, -0.5]] * 3, ["stop"] * 3)
    assert [completion.versions for completion in samples.completions] == [[(3, 2)]] * 3
    assert manager.sampled_tokens == 6


async def test_the_upstream_form_has_four_lists() -> None:
    async with MockInferenceServer(reply) as engine:
        manager = manager_of(engine)
        prompt, outputs, logprobs, reasons = await manager.tokens_and_logprobs_completion(
            input_ids=[5], max_new_tokens=1
        )
        await manager.close()

    assert (prompt, outputs, logprobs, reasons) == ([5], [[50]], [[-0.25]], ["length"])


async def test_requests_go_to_the_least_busy_server() -> None:
    async with MockInferenceServer(reply, latency_s=0.1) as one, MockInferenceServer(reply, latency_s=0.1) as two:
        manager = manager_of(one, two)
        await asyncio.gather(*(sample(manager) for _ in range(8)))
        await manager.close()

    assert (len(one.requests), len(two.requests)) == (4, 4)


@pytest.mark.parametrize("fault", ["refuse", "drop", "abort"])
async def test_a_failed_request_is_tried_again(fault: str) -> None:
    async with MockInferenceServer(reply) as engine:
        setattr(engine.faults, fault, 1)
        manager = manager_of(engine)
        samples = await sample(manager)
        await manager.close()

    assert samples.completions[0].token_ids == [50, 2]
    assert len(engine.requests) == 2


async def test_a_dead_server_is_left_alone_and_used_again_when_it_is_back() -> None:
    async with MockInferenceServer(reply) as one, MockInferenceServer(reply) as two:
        manager = manager_of(one, two)
        await one.stop()
        await asyncio.gather(*(sample(manager) for _ in range(4)))
        assert len(two.requests) == 4

        await one.start()
        async with asyncio.timeout(10):
            while not one.requests:
                await sample(manager)
                await asyncio.sleep(0.05)
        await manager.close()


async def test_requests_wait_for_a_server_that_restarts() -> None:
    async with MockInferenceServer(reply) as engine:
        manager = manager_of(engine)
        await engine.stop()
        waiting = asyncio.create_task(sample(manager))
        await asyncio.sleep(0.2)
        await engine.start()
        async with asyncio.timeout(10):
            samples = await waiting
        await manager.close()

    assert samples.completions[0].token_ids == [50, 2]


async def test_the_wait_ends_with_an_error_that_names_the_server() -> None:
    manager = ServerManager([APIServerConfig(base_url="http://127.0.0.1:9/v1", server_type="vllm", timeout=1)])

    with pytest.raises(ModelServerError, match=r"127\.0\.0\.1:9"):
        async with asyncio.timeout(10):
            await sample(manager)
    await manager.close()


async def test_training_refuses_tokens_of_unpublished_weights_until_they_are_published() -> None:
    async with MockInferenceServer(reply, weight_version="default") as engine:
        manager = manager_of(engine)
        assert (await sample(manager)).completions[0].versions == [(-1, 2)], "evaluation may use them"

        manager.train_only_on_published_versions()
        waiting = asyncio.create_task(sample(manager))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        engine.weight_version = "4"
        async with asyncio.timeout(10):
            samples = await waiting
        await manager.close()

    assert samples.completions[0].versions == [(4, 2)]


async def test_a_refused_request_is_no_reason_to_leave_the_server_alone() -> None:
    async with MockInferenceServer(reply) as engine:
        engine._answer = refuse  # type: ignore[method-assign]
        manager = manager_of(engine)
        with pytest.raises(RolloutError, match="too long"):
            await sample(manager)
        assert manager.servers[0].server_healthy
        await manager.close()


async def refuse(method: str, path: str, body: Any) -> tuple[int, Any]:
    return 400, {"error": {"message": "prompt too long"}}


async def test_a_missing_route_says_how_to_start_the_server() -> None:
    async with MockInferenceServer(reply) as engine:

        async def closed(method: str, path: str, body: Any) -> tuple[int, Any]:
            return 403, {"error": "disabled"}

        engine._answer = closed  # type: ignore[method-assign]
        manager = manager_of(engine)
        with pytest.raises(ConfigError, match="--enable-scale-out"):
            await sample(manager)
        await manager.close()


def test_spans_become_runs() -> None:
    spans = [
        {"version": "1", "start": 0, "end": 2},
        {"version": "1", "start": 2, "end": 3},
        {"version": "2", "start": 3, "end": 5},
    ]

    assert version_runs(spans, 5, server="s") == [(1, 3), (2, 2)]
    assert version_runs([], 0, server="s") == []
    assert version_runs(None, 2, server="s") == [(-1, 2)]
    assert version_runs([{"version": "default", "start": 0, "end": 2}], 2, server="s") == [(-1, 2)]
    assert merge_runs([(1, 2), (1, 1), (2, 0), (3, 1)]) == [(1, 3), (3, 1)]


@pytest.mark.parametrize("span", [{"version": "1", "start": 1, "end": 5}, {"version": "1", "start": 0, "end": 4}])
def test_spans_that_do_not_cover_the_output_are_an_error(span: dict[str, Any]) -> None:
    with pytest.raises(ModelServerError, match="weight versions"):
        version_runs([span], 5, server="s")


def test_sampling_parameters_are_spelt_out_and_renamed() -> None:
    params = sampling_params({"max_new_tokens": 7, "temperature": 0.5, "stop": None})

    assert params == {
        "max_tokens": 7, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1, "logprobs": 0,
    }  # fmt: skip


def test_what_a_bare_config_means() -> None:
    bare = APIServerConfig(base_url="http://a/v1", api_key="k")

    assert server_list(bare) == [bare]
    assert [config.base_url for config in server_list(ServerBaseline(timeout=5))] == [
        f"http://localhost:{port}/v1" for port in range(9004, 9008)
    ]
    assert bare.root_url == "http://a"
