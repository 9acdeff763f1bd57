"""Reward functions as TRL's users write them, and what is said of those that fail."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
import urllib.error
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import httpx
import openai
import pytest
import requests

from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError, RolloutError
from trainer.errors import RewardFunctionError
from trainer.local.rewards import RewardFunctions, combined

COLUMNS: dict[str, Sequence[Any]] = {
    "prompts": ["1 + 1 =", "1 + 1 ="],
    "completions": ["2", "three"],
    "completion_ids": [[5], [6, 7]],
    "answer": [2, 2],
}


async def directly(call: Callable[[], Any]) -> Any:
    return call()


async def scores(functions: Any, weights: Sequence[float] | None = None) -> list[list[float | None]]:
    return await RewardFunctions(functions, weights).score(COLUMNS, on_thread=directly, timeout_s=10.0)


async def test_a_function_gets_every_column_as_lists() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0, 0.0]

    assert await scores(reward) == [[1.0, 0.0]]
    assert seen == COLUMNS


async def test_a_function_need_not_take_what_it_does_not_use() -> None:
    def right(completions: list[str], answer: list[int]) -> list[float]:
        return [float(text == str(number)) for text, number in zip(completions, answer, strict=True)]

    assert await scores(right) == [[1.0, 0.0]]


async def test_functions_may_be_async_objects_and_names() -> None:
    async def waits(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    class Callable_:  # noqa: N801
        async def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [0.25] * len(completions)

    class Ours(RewardFunction):
        def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
            return [2.0, 3.0]

    functions = RewardFunctions([waits, Callable_(), Ours(weight=0.5), "format"])

    rewards = await functions.score(COLUMNS, on_thread=directly, timeout_s=10.0)

    assert rewards[:3] == [[0.5, 0.5], [0.25, 0.25], [1.0, 1.5]]
    assert functions.names[0] == "waits"
    assert len(rewards[3]) == 2


async def test_blocking_functions_run_where_they_are_told_and_async_ones_do_not() -> None:
    ran: list[str] = []

    async def on_thread(call: Callable[[], Any]) -> Any:
        ran.append("thread")
        return call()

    async def waits(completions: list[str]) -> list[float]:
        return [0.0, 0.0]

    await RewardFunctions([waits, lambda completions: [1, 2]]).score(COLUMNS, on_thread=on_thread, timeout_s=10.0)

    assert ran == ["thread"]


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0], "1 rewards for 2 completions"),
        (3.0, "expected a list of 2 numbers"),
        (None, "expected a list of 2 numbers"),
        (["good", "bad"], "expected a list of 2 numbers"),
        ([1.0, math.nan], "return None"),
    ],
)
async def test_what_is_no_list_of_rewards_is_refused(returned: Any, told: str) -> None:
    with pytest.raises(RewardFunctionError, match=told):
        await scores(lambda completions: returned)


async def test_a_bug_is_told_with_its_cause() -> None:
    def buggy(completions: list[str]) -> list[float]:
        return [1 / len(text[5:]) for text in completions]

    with pytest.raises(RewardFunctionError, match="'buggy' failed: ZeroDivisionError") as failure:
        await scores(buggy)

    assert isinstance(failure.value.__cause__, ZeroDivisionError)


REQUEST = httpx.Request("GET", "http://judge")


def status_of_httpx(status: int) -> Exception:
    return httpx.HTTPStatusError("", request=REQUEST, response=httpx.Response(status))


def status_of_requests(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("gone"),
        TimeoutError(),
        socket.gaierror("no such host"),
        urllib.error.URLError("no route"),
        httpx.ReadTimeout("slow"),
        openai.APITimeoutError(REQUEST),  # type: ignore[arg-type]
        aiohttp.ServerTimeoutError(),
        requests.ConnectionError(),
        requests.ReadTimeout(),
        status_of_httpx(503),
        status_of_requests(429),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_judge_that_cannot_be_reached_is_no_bug(error: Exception) -> None:
    def judge(completions: list[str]) -> list[float]:
        raise error

    with pytest.raises(RolloutError, match="got no answer"):
        await scores(judge)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("answers.json"), PermissionError("/tmp"), status_of_httpx(401), status_of_requests(404)],
    ids=lambda error: type(error).__name__,
)
async def test_what_another_try_would_not_mend_is_a_bug(error: Exception) -> None:
    def judge(completions: list[str]) -> list[float]:
        raise error

    with pytest.raises(RewardFunctionError, match="'judge' failed"):
        await scores(judge)


async def test_a_function_that_leaves_python_is_a_bug() -> None:
    with pytest.raises(RewardFunctionError, match="SystemExit: 3"):
        await scores(lambda completions: sys.exit(3))


async def test_an_async_function_has_the_time_limit_too() -> None:
    async def hangs(completions: list[str]) -> list[float]:
        await asyncio.get_running_loop().create_future()
        return []

    with pytest.raises(RolloutError, match=r"'hangs' took longer than 0\.01 s; raise reward_timeout_s"):
        await RewardFunctions(hangs).score(COLUMNS, on_thread=directly, timeout_s=0.01)


def test_a_function_of_no_weight_judges_nothing() -> None:
    assert combined([[1.0, None], [0.5, 0.5]], [1.0, 0.0]) == [1.0, None]


def test_rewards_are_summed_over_the_functions_that_judged() -> None:
    assert combined([[1.0, None, None], [0.5, 2.0, None]], [1.0, 10.0]) == [6.0, 20.0, None]


@pytest.mark.parametrize(
    ("functions", "weights", "told"),
    [
        ([], None, "empty"),
        ([len], [1.0, 2.0], "2 reward_weights for 1"),
        ([len, max], [0.0, 0.0], "at least one of them not 0"),
        ([len], [math.nan], "finite numbers"),
        ([3], None, "cannot be called"),
        ("no_such_reward", None, "unknown reward function 'no_such_reward'"),
    ],
)
def test_what_cannot_pay_is_refused_at_once(functions: Any, weights: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RewardFunctions(functions, weights)
