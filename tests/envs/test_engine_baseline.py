"""What every client of an inference server does: slots, counting, attempts, and upstream's contract for subclasses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from atroposlib.envs.server_handling.engines.request_stats import percentile
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.errors import ModelServerError, RolloutError


class UpstreamStyleServer(APIServer):
    """Defines the four methods that upstream asks for, and nothing of ours."""

    def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
        super().__init__(config, reasoning_config)
        self.calls: list[dict[str, Any]] = []
        self.failures: list[Exception] = []
        self.checks = 0

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        while True:
            self.checks += 1
            self.server_healthy = True
            await asyncio.sleep(60)

    async def _chat_completion_wrapper(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        if self.failures:
            raise self.failures.pop(0)
        return "chat"

    async def _completion_wrapper(self, **kwargs: Any) -> Any:
        return "text"

    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        return kwargs["input_ids"], [[5, 6], [7]], [[-0.1, -0.2], [-0.3]], [{"type": "stop"}, "length"]


def a_server(cls: type[Any] = UpstreamStyleServer, **config: Any) -> Any:
    return cls(APIServerConfig(base_url="http://127.0.0.1:9/v1", model_name="m", **config))


async def test_a_subclass_of_upstreams_four_methods_samples_tokens_of_unknown_version() -> None:
    server = a_server()

    samples = await server.sample_tokens(input_ids=[1, 2], n=2)

    assert server.returns_tokens
    assert samples.as_lists() == ([1, 2], [[5, 6], [7]], [[-0.1, -0.2], [-0.3]], ["stop", "length"])
    assert [completion.versions for completion in samples.completions] == [[(-1, 2)], [(-1, 1)]]
    assert await server.tokens_and_logprobs_completion(input_ids=[1, 2]) == samples.as_lists()
    assert (server.load.sampled_tokens, server.load.completions) == (6, 4)


async def test_the_most_derived_token_method_wins() -> None:
    class Native(UpstreamStyleServer):
        async def _sample_tokens_wrapper(self, **kwargs: Any) -> Any:
            return (await super()._sample_tokens_wrapper(**kwargs)).completions

    class Lists(Native):
        async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
            return [1], [[9]], [[-1.0]], ["stop"]

    assert (await a_server(Lists).sample_tokens(input_ids=[1])).completions[0].token_ids == [9]


async def test_lists_that_do_not_fit_together_are_refused() -> None:
    class Broken(UpstreamStyleServer):
        async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
            return [1], [[9, 9]], [[-1.0]], ["stop"]

    with pytest.raises(ModelServerError, match="2 tokens came with 1 logprobs"):
        await a_server(Broken).sample_tokens(input_ids=[1])


async def test_an_aborted_completion_is_a_failure_not_training_data() -> None:
    class Aborting(UpstreamStyleServer):
        async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
            return [1], [[9], [8]], [[-1.0], [-1.0]], ["stop", {"type": "abort"}]

    with pytest.raises(ModelServerError, match="aborted"):
        await a_server(Aborting).sample_tokens(input_ids=[1])


async def test_a_server_without_a_token_method_says_so() -> None:
    class TextOnly(APIServer):
        async def _chat_completion_wrapper(self, **kwargs: Any) -> Any: ...

        async def _completion_wrapper(self, **kwargs: Any) -> Any: ...

    server = a_server(TextOnly)

    assert not server.returns_tokens
    with pytest.raises(NotImplementedError, match="vllm"):
        await server.sample_tokens(input_ids=[1])
    with pytest.raises(NotImplementedError, match="does not implement get_logprobs"):
        await server.get_logprobs(input_ids=[1])


async def test_what_a_client_library_raises_for_a_dead_server_becomes_ours_and_a_refusal_stays() -> None:
    server = a_server()
    server.failures = [ConnectionResetError("gone")]
    with pytest.raises(ModelServerError, match="gone") as raised:
        await server.chat_completion(messages=[])
    assert isinstance(raised.value.__cause__, ConnectionResetError)
    assert not server.server_healthy

    server.failures = [KeyError("mistake")]
    with pytest.raises(KeyError):
        await server.chat_completion(messages=[])
    assert server.load.failures == 1


async def test_a_subclass_own_health_task_is_started_when_it_is_needed_and_ended_by_close() -> None:
    server = a_server()
    server.failures = [ConnectionResetError("gone")]
    with pytest.raises(ModelServerError):
        await server.chat_completion(messages=[])
    assert server.checks == 0, "no check while the server works"

    server.load.retry_at = 0.0
    assert await server.recover()
    assert server.server_healthy
    assert server.checks == 1
    await server.close()
    assert server.check_task.done()


async def test_a_health_task_that_does_not_call_the_server_well_keeps_it_out() -> None:
    class Down(UpstreamStyleServer):
        async def check_server_status_task(self, chat_completion: bool = True) -> None:
            await asyncio.sleep(60)

    server = a_server(Down)
    server.server_healthy = False

    assert not await server.recover()
    await server.close()


async def test_one_attempt_unless_more_are_asked_for_and_the_last_failure_is_raised_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def no_pause(seconds: float) -> None:
        pauses.append(seconds)

    pauses: list[float] = []
    monkeypatch.setattr("atroposlib.envs.server_handling.server_baseline.asyncio.sleep", no_pause)
    server = a_server()
    server.failures = [ModelServerError("first"), ModelServerError("second")]
    with pytest.raises(ModelServerError, match="first"):
        await server.chat_completion(messages=[])

    server.max_tries = 3
    server.failures = [ModelServerError("a"), ModelServerError("b"), ModelServerError("c")]
    with pytest.raises(ModelServerError, match="c"):
        await server.chat_completion(messages=[])
    server.failures = [ModelServerError("a")]
    assert await server.chat_completion(messages=[]) == "chat"

    assert len(server.calls) == 1 + 3 + 2
    assert list(server.attempts_list) == [2]
    assert len(pauses) == 3
    assert all(0 < pause <= 5 for pause in pauses)


async def test_no_attempt_begins_after_the_time_is_over() -> None:
    server = a_server(timeout=1)
    server.max_tries = 100
    server.failures = [ModelServerError(str(i)) for i in range(100)]
    with pytest.raises(ModelServerError):
        async with asyncio.timeout(5):
            await server.chat_completion(messages=[])
    assert len(server.calls) <= 3


async def test_training_and_evaluation_have_their_own_slots() -> None:
    class Slow(UpstreamStyleServer):
        async def _chat_completion_wrapper(self, **kwargs: Any) -> Any:
            assert "split" not in kwargs
            await gate.wait()
            return "chat"

    gate = asyncio.Event()
    server = a_server(Slow, num_max_requests_at_once=2, num_requests_for_eval=1)
    requests = [
        asyncio.create_task(server.chat_completion(messages=[], split=split))
        for split in ("train",) * 3 + ("eval",) * 2
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert (server.load.requests, server.load.in_flight, server.load.eval_in_flight) == (3, 5, 2)
    gate.set()
    await asyncio.gather(*requests)
    assert (server.load.in_flight, server.load.eval_in_flight) == (0, 0)
    assert (len(server.request_timings), len(server.eval_request_timings)) == (3, 2)


async def test_a_weight_takes_slots_away_and_gives_them_back() -> None:
    server = a_server(num_max_requests_at_once=8, num_requests_for_eval=4)

    await server.update_weight(0.5)

    assert (server.sem.min_val(), server.eval_sem.min_val()) == (4, 2)


async def test_metrics_look_back_on_the_latest_requests_only() -> None:
    server = a_server(rolling_buffer_length=2)
    for _ in range(3):
        await server.chat_completion(messages=[])
    await server.chat_completion(messages=[], split="eval")
    server.request_timings.extend([1.0, 3.0])

    metrics = await server.wandb_metrics({"other": 1}, "one")

    assert set(metrics) == {"other", "server/one_average_num_attempts", "server/one_eval_retry_rate"} | {
        f"server/one_{split}request_time_{name}" for split in ("", "eval_") for name in ("avg", "std", "99p")
    }
    assert metrics["server/one_request_time_avg"] == 2.0
    assert metrics["server/one_request_time_std"] == 1.0
    assert metrics["server/one_request_time_99p"] == pytest.approx(2.98)
    assert (metrics["server/one_average_num_attempts"], metrics["server/one_eval_retry_rate"]) == (1, 0)


async def test_a_server_that_did_nothing_has_no_metrics() -> None:
    assert await a_server().wandb_metrics(None, None) == {}
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


async def test_our_own_refusals_are_no_failure_of_the_server() -> None:
    server = a_server()
    server.failures = [RolloutError("refused")]
    with pytest.raises(RolloutError) as raised:
        await server.chat_completion(messages=[])
    assert type(raised.value) is RolloutError
    assert server.server_healthy
    assert server.load.failures == 0


async def test_the_health_task_of_our_own_keeps_the_mark_true() -> None:
    class Ours(UpstreamStyleServer):
        check_server_status_task = APIServer.check_server_status_task

        async def check_health(self) -> None:
            self.checks += 1
            raise ModelServerError("down")

    server = a_server(Ours)
    task = asyncio.create_task(server.check_server_status_task())
    await asyncio.sleep(0)
    assert (server.checks, server.server_healthy) == (1, False)
    task.cancel()
