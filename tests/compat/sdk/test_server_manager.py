"""How servers are built from what environments hand over, and how requests are shared among them."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig, ReasoningConfig, ServerBaseline, ServerManager
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.server_baseline import APIServer, AsyncSemWithAdaptiveWeight
from atroposlib.envs.server_handling.server_harness import ServerHarness, create_chat_completion
from atroposlib.envs.server_handling.sglang_server import SGLangServer
from atroposlib.envs.server_handling.trl_vllm_server import TrlVllmServer
from atroposlib.envs.server_handling.vllm_server import VLLMServer, sampling_params
from atroposlib.errors import ModelServerError
from tests.envs.engine_fakes import FakeEngine, chat_answer
from tests.envs.fake_servers import FakeServer, a_pool

URL = "http://127.0.0.1:1/v1"
FOUR_PORTS = [f"http://localhost:{port}/v1" for port in range(9004, 9008)]


def urls_of(manager: ServerManager) -> list[str | None]:
    return [server.config.base_url for server in manager.servers]


# Construction


@pytest.mark.parametrize(
    ("kind", "cls"), [("openai", OpenAIServer), ("vllm", VLLMServer), ("sglang", SGLangServer), ("trl", TrlVllmServer)]
)
def test_an_abstract_server_class_means_the_one_of_the_server_type(kind: Any, cls: type[APIServer]) -> None:
    manager = ServerManager([APIServerConfig(base_url=URL, server_type=kind)], APIServer)  # type: ignore[type-abstract]

    assert type(manager.servers[0]) is cls


def test_a_server_class_of_ones_own_is_used() -> None:
    assert type(ServerManager([APIServerConfig(base_url=URL)], FakeServer).servers[0]) is FakeServer


def test_a_list_has_one_server_an_entry() -> None:
    manager = ServerManager([APIServerConfig(base_url=f"http://{host}/v1") for host in "ab"])

    assert urls_of(manager) == ["http://a/v1", "http://b/v1"]


def test_a_baseline_is_four_local_ports_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)

    manager = ServerManager(ServerBaseline(timeout=7, model_name="m", num_max_requests_at_once=3, server_type="vllm"))

    assert urls_of(manager) == FOUR_PORTS
    shared = {(one.config.timeout, one.config.model_name, one.sem.max_val) for one in manager.servers}
    assert shared == {(7, "m", 3)}


def test_a_reasoning_config_reaches_every_server() -> None:
    reasoning = ReasoningConfig(effort="low")

    manager = ServerManager([APIServerConfig(base_url=URL)] * 2, reasoning_config=reasoning)

    assert [server.reasoning_config for server in manager.servers] == [reasoning, reasoning]


@pytest.mark.parametrize(
    ("argument", "variable", "url"),
    [(None, "http://v", "http://v"), ("http://a", "http://v", "http://a"), (None, "", None)],
)
def test_the_proxy_is_given_or_comes_from_the_variable(
    argument: str | None, variable: str, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATROPOS_PROXY_URL", variable)

    assert ServerManager([APIServerConfig(base_url=URL)], proxy_url=argument).proxy_url == url


def test_attributes_that_environments_read_and_set() -> None:
    manager = ServerManager([APIServerConfig(base_url=URL)])
    manager.tool_parser = "hermes"

    assert (manager.max_n_completions, manager.use_proxy, manager.reasoning_config) == (8, False, None)
    assert manager._get_server_base_url() == URL


async def test_a_manager_made_without_its_constructor_answers() -> None:
    manager = object.__new__(ServerManager)
    manager.servers, manager.max_n_completions, manager.reasoning_config = list(a_pool("a")[1]), 8, None

    answer = await manager.chat_completion(messages=[{"role": "user", "content": "x"}])

    assert answer.choices[0].message.content == "http://a/v1"
    await manager.close()


# Requests


@pytest.mark.parametrize(("n", "parts"), [(1, [1]), (8, [8]), (20, [4, 8, 8])])
@pytest.mark.parametrize("method", ["chat_completion", "completion"])
async def test_more_choices_than_eight_are_asked_in_parts(method: str, n: int, parts: list[int]) -> None:
    manager, (server,) = a_pool("a")
    prompt: Any = {"messages": []} if method == "chat_completion" else {"prompt": "x"}

    answer = await getattr(manager, method)(n=n, **prompt)

    assert sorted(kwargs["n"] for _, kwargs in server.calls) == parts
    assert [choice.index for choice in answer.choices] == list(range(n)), "numbered through"
    await manager.close()


async def test_the_model_of_the_config_wins_over_the_caller() -> None:
    manager, (server,) = a_pool("a", model_name="served")

    await manager.chat_completion(messages=[], model="asked for")

    assert server.calls[0][1]["model"] == "served"
    await manager.close()


async def test_split_is_for_the_manager_and_never_reaches_the_engine() -> None:
    manager, (server,) = a_pool("a")

    await manager.chat_completion(messages=[], split="eval")
    await manager.completion(prompt="x", split="train")

    assert all("split" not in kwargs for _, kwargs in server.calls)
    assert (len(server.eval_request_timings), len(server.request_timings)) == (1, 1)
    await manager.close()


async def test_metrics_of_a_server_have_the_old_keys() -> None:
    manager, (server,) = a_pool("a")
    await manager.chat_completion(messages=[])
    await manager.chat_completion(messages=[], split="eval")

    metrics = await server.wandb_metrics({"own": 1}, "server_0")

    names = {f"{kind}request_time_{figure}" for kind in ("", "eval_") for figure in ("avg", "std", "99p")}
    assert {f"server/server_0_{name}" for name in names | {"average_num_attempts", "eval_retry_rate"}} <= set(metrics)
    assert metrics["own"] == 1
    await manager.close()


async def test_the_weight_scales_both_kinds_of_slots_of_every_server() -> None:
    manager, servers = a_pool("ab", num_max_requests_at_once=8, num_requests_for_eval=4)

    await manager.update_weight(0.5)

    assert [
        (one.sem.max_val - one.sem.min_val(), one.eval_sem.max_val - one.eval_sem.min_val()) for one in servers
    ] == [(4, 2)] * 2
    await manager.close()


@pytest.mark.parametrize(("weight", "slots"), [(1.0, 8), (0.5, 4), (0.01, 1)])
async def test_slots_that_a_weight_leaves(weight: float, slots: int) -> None:
    semaphore = AsyncSemWithAdaptiveWeight(8)
    semaphore.update_weight(weight)

    taken = 0
    while not semaphore.locked():
        await semaphore.acquire()
        taken += 1

    assert taken == slots
    assert semaphore._value == 8 - slots


async def test_a_dedicated_server_answers_by_itself() -> None:
    manager, _ = a_pool("a", num_max_requests_at_once=1)

    async with manager.dedicated_server() as server, asyncio.timeout(5):
        answer = await server.chat_completion(messages=[])

    assert answer.choices[0].message.content == "http://a/v1"
    await manager.close()


async def test_waiting_for_a_slot_takes_none() -> None:
    manager, (server,) = a_pool("a", num_max_requests_at_once=1)

    async with asyncio.timeout(5):
        await manager.wait_for_sem(True)
        await manager.wait_for_sem(is_training=False)

    assert not server.sem.locked()
    await manager.close()


async def test_in_testing_a_harness_answers_every_kind_of_request() -> None:
    manager = ServerManager([APIServerConfig(base_url=URL)], testing=True)
    harness: Any = manager.servers[0]
    assert isinstance(harness, ServerHarness)
    messages = [{"role": "user", "content": "hi"}]
    harness.set_desired_response(messages, create_chat_completion("yes"))
    harness.set_tokens_and_logprobs_response("p", [1], [[2]], [[-0.1]], ["stop"])

    answer = await manager.chat_completion(messages=messages)

    assert answer.choices[0].message.content == "yes"
    assert await manager.tokens_and_logprobs_completion(prompt="p") == ([1], [[2]], [[-0.1]], ["stop"])
    await manager.update_weight(0.5)
    await manager.close()


# One server


@pytest.mark.parametrize("key", ["", None, "secret"])
async def test_an_empty_key_is_no_obstacle(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    async with FakeEngine({"POST /v1/chat/completions": lambda body: (200, chat_answer("yes"))}) as engine:
        server = OpenAIServer(APIServerConfig(base_url=engine.url, api_key=key))
        await server.chat_completion(messages=[{"role": "user", "content": "x"}])
        await server.close()

    assert engine.headers[0].get("Authorization") == (f"Bearer {key}" if key else None)


@pytest.mark.parametrize(("ignored", "n", "bodies"), [(False, 3, [3, 1, 1]), (True, 3, [1, 1, 1]), (True, 1, [1])])
async def test_a_server_that_ignores_n_is_asked_for_what_is_missing(
    ignored: bool, n: int, bodies: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeEngine({"POST /v1/chat/completions": lambda body: (200, chat_answer("yes"))}) as engine:
        server = OpenAIServer(APIServerConfig(base_url=engine.url, n_kwarg_is_ignored=ignored))
        with caplog.at_level(logging.WARNING):
            answer = await server.chat_completion(messages=[], n=n)
        await server.close()

    assert [body.get("n", 1) for body in engine.bodies("POST /v1/chat/completions")] == bodies
    assert len(answer.choices) == n
    assert server.config.n_kwarg_is_ignored is (ignored or n > 1)


async def test_reasoning_is_asked_for_in_chats_only_and_can_be_skipped() -> None:
    manager, (server,) = a_pool("a")
    server.reasoning_config = ReasoningConfig(effort="low")

    await manager.chat_completion(messages=[], extra_body={"own": 1})
    await manager.chat_completion(messages=[], skip_reasoning=True)
    await manager.completion(prompt="x")

    asked = [kwargs.get("extra_body") for _, kwargs in server.calls]
    assert asked == [{"own": 1, "reasoning": {"enabled": True, "effort": "low"}}, None, None]
    assert all("skip_reasoning" not in kwargs for _, kwargs in server.calls)
    await manager.close()


@pytest.mark.parametrize("cls", [OpenAIServer])
async def test_a_text_server_returns_no_tokens(cls: type[APIServer]) -> None:
    server = cls(APIServerConfig(base_url=URL))

    with pytest.raises(NotImplementedError, match="does not return token ids"):
        await server.tokens_and_logprobs_completion(prompt="x")
    with pytest.raises(NotImplementedError, match="get_logprobs"):
        await server.get_logprobs(prompt="x")
    await server.close()


async def test_what_a_dead_server_said_is_what_is_raised() -> None:
    server = OpenAIServer(APIServerConfig(base_url=URL))

    with pytest.raises(ModelServerError, match=r"127\.0\.0\.1:1"):
        await server.chat_completion(messages=[])
    await server.close()


# The engines' own forms


async def test_vllm_gets_ids_and_renamed_limits_and_a_doubled_bos_is_dropped() -> None:
    def generate(body: Any) -> Any:
        return 200, {"logprobs": [[[{"7": -0.5}], [{"8": -0.25}]]], "finish_reasons": ["stop"]}

    async with FakeEngine({"POST /generate": generate}) as engine:
        server = VLLMServer(APIServerConfig(base_url=engine.url, server_type="vllm", api_key="k"))
        vars(server)["tokenizer"] = SimpleNamespace(bos_token_id=1, encode=lambda text: [1, 1, 5])
        found = await server.tokens_and_logprobs_completion(prompt="<s>x", max_new_tokens=9)
        await server.close()

    body = engine.bodies("POST /generate")[0]
    assert body["prompt"] == {"prompt_token_ids": [1, 5]}
    assert body["max_tokens"] == 9
    assert engine.headers[-1]["Authorization"] == "Bearer k"
    assert found == ([1, 5], [[7, 8]], [[-0.5, -0.25]], ["stop"])


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "max_completion_tokens"])
def test_every_name_of_the_limit_is_understood_by_vllm(name: str) -> None:
    assert sampling_params({name: 7})["max_tokens"] == 7


async def test_vllm_logprobs_of_a_prompt() -> None:
    def generate(body: Any) -> Any:
        return 200, {"prompt_logprobs": [None, {"6": -0.5, "9": -1.5}]}

    async with FakeEngine({"POST /generate": generate}) as engine:
        server = VLLMServer(APIServerConfig(base_url=engine.url, server_type="vllm"))
        found = await server.get_logprobs(input_ids=[5, 6], top_k=2)
        await server.close()

    asked = engine.bodies("POST /generate")[0]
    assert {"prompt_logprobs": 2, "n": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 1}.items() <= asked.items()
    assert found == {
        "prompt_tokens": [5, 6],
        "prompt_topk_token_ids": [[], [6, 9]],
        "prompt_topk_logprobs": [[], [-0.5, -1.5]],
    }


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("reason", [{"type": "length"}, "length"])
async def test_sglang_answers_in_either_form(as_list: bool, reason: Any) -> None:
    one = {"text": "", "meta_info": {"output_token_logprobs": [[-0.5, 7, None]], "finish_reason": reason}}

    async with FakeEngine({"POST /generate": lambda body: (200, [one] if as_list else one)}) as engine:
        server = SGLangServer(APIServerConfig(base_url=engine.url, server_type="sglang"))
        found = await server.tokens_and_logprobs_completion(input_ids=[5], max_tokens=1)
        await server.close()

    body = engine.bodies("POST /generate")[0]
    assert (body["input_ids"], body["return_logprob"], body["sampling_params"]["max_new_tokens"]) == ([5], True, 1)
    assert found == ([5], [[7]], [[-0.5]], ["length"])


async def test_trl_keeps_special_tokens_in_the_text(tokenizer: Any, tokenizer_name: str) -> None:
    ids = [*tokenizer.encode("ok", add_special_tokens=False), tokenizer.eos_token_id]

    async with FakeEngine({"POST /generate/": lambda body: (200, {"completion_ids": [ids, ids[:1]]})}) as engine:
        root = engine.url.removesuffix("/v1")
        server = TrlVllmServer(APIServerConfig(base_url=root, server_type="trl", tokenizer_name=tokenizer_name))
        answer = await server.completion(prompt="x", n=2)
        await server.close()

    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [
        ("ok<|im_end|>", "stop"),
        ("o", "length"),
    ]
    assert engine.bodies("POST /generate/")[0] == {
        "prompts": ["x"], "n": 2, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
        "min_p": 0.0, "max_tokens": 1024,
    }  # fmt: skip
