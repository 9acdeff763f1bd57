"""SGLang's native route. The server is a FAKE: its bodies follow SGLang's documentation, no SGLang ran."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.sglang_server import SGLangServer
from atroposlib.errors import ModelServerError, PromptLogprobsError
from tests.envs.engine_fakes import FakeEngine

GENERATE = "POST /generate"


def server_of(engine: FakeEngine) -> SGLangServer:
    return SGLangServer(APIServerConfig(base_url=engine.url, server_type="sglang", model_name="m", timeout=5))


def output(version: str | None = None, finish_reason: Any = "stop") -> dict[str, Any]:
    info = {
        "finish_reason": finish_reason,
        "output_token_logprobs": [[-0.1, 7, None], [-0.2, 2, None]],
        **({} if version is None else {"weight_version": version}),
    }
    return {"text": "x", "meta_info": info}


async def test_token_ids_and_logprobs_come_from_the_meta_information() -> None:
    outputs = [output("3", {"type": "stop", "matched": 2}), output("3", {"type": "length", "length": 2})]
    async with FakeEngine({GENERATE: lambda body: (200, outputs)}) as engine:
        server = server_of(engine)
        samples = await server.sample_tokens(input_ids=[1, 5], n=2, max_tokens=4, top_k=0, logprobs=1)
        await server.close()

    assert samples.as_lists() == ([1, 5], [[7, 2]] * 2, [[-0.1, -0.2]] * 2, ["stop", "length"])
    assert samples.completions[0].versions == [(3, 2)]
    assert engine.bodies(GENERATE) == [
        {
            "input_ids": [1, 5],
            "sampling_params": {
                "n": 2, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            },
            "return_logprob": True,
            "return_text_in_logprobs": False,
        }
    ]  # fmt: skip


async def test_a_single_object_is_one_completion_and_a_server_may_know_no_version() -> None:
    async with FakeEngine({GENERATE: lambda body: (200, output())}) as engine:
        server = server_of(engine)
        samples = await server.sample_tokens(input_ids=[1])
        await server.close()

    assert [completion.versions for completion in samples.completions] == [[(-1, 2)]]


async def test_for_training_the_version_before_the_request_counts_when_it_is_older() -> None:
    versions = iter(["3", "4"])
    async with FakeEngine(
        {
            GENERATE: lambda body: (200, output("4")),
            "GET /model_info": lambda body: (200, {"weight_version": next(versions)}),
        }
    ) as engine:
        server = server_of(engine)
        server.require_version = True
        over_an_update = await server.sample_tokens(input_ids=[1])
        after_it = await server.sample_tokens(input_ids=[1])
        del engine.routes["GET /model_info"]
        without_a_look_before = await server.sample_tokens(input_ids=[1])
        await server.close()

    assert without_a_look_before.completions[0].versions == [(-1, 2)]
    assert over_an_update.completions[0].versions == [(3, 2)]
    assert after_it.completions[0].versions == [(4, 2)]


async def test_unpublished_weights_are_refused_for_training_only() -> None:
    async with FakeEngine(
        {
            GENERATE: lambda body: (200, output("default")),
            "GET /model_info": lambda body: (200, {"weight_version": "default"}),
            "GET /health": lambda body: (200, ""),
        }
    ) as engine:
        server = server_of(engine)
        assert (await server.sample_tokens(input_ids=[1])).completions[0].versions == [(-1, 2)]
        await server.check_health()

        server.require_version = True
        with pytest.raises(ModelServerError, match="published"):
            await server.sample_tokens(input_ids=[1])
        with pytest.raises(ModelServerError, match="published"):
            await server.check_health()
        await server.close()


@pytest.mark.parametrize("route", ["/model_info", "/get_model_info", "/get_weight_version"])
async def test_the_current_version_from_newer_and_older_servers(route: str) -> None:
    async with FakeEngine({f"GET {route}": lambda body: (200, {"weight_version": "12"})}) as engine:
        server = server_of(engine)
        assert await server.current_version() == 12
        engine.routes.clear()
        assert await server.current_version() is None
        await server.close()


async def test_an_aborted_request_and_a_missing_completion_are_failures() -> None:
    async with FakeEngine({GENERATE: lambda body: (200, output("1", {"type": "abort", "message": "gone"}))}) as engine:
        server = server_of(engine)
        with pytest.raises(ModelServerError, match="gone"):
            await server.sample_tokens(input_ids=[1])
        engine.routes[GENERATE] = lambda body: (200, [output()])
        with pytest.raises(ModelServerError, match="returned 1 completions for n=2"):
            await server.sample_tokens(input_ids=[1], n=2)
        await server.close()


async def test_health_spends_no_completion() -> None:
    async with FakeEngine({"GET /health": lambda body: (503, "")}) as engine:
        server = server_of(engine)
        with pytest.raises(ModelServerError, match="503"):
            await server.check_health()
        await server.close()

    assert engine.asked == [("GET /health", None)]


async def test_logprobs_of_a_prompt_begin_with_its_own_token() -> None:
    info = {
        "input_token_logprobs": [[None, 1, None], [-0.5, 5, None], [-3.0, 6, None]],
        "input_top_logprobs": [None, [[-0.5, 5, None], [-2.0, 8, None]], [[-0.1, 9, None], [-0.2, 8, None]]],
    }
    async with FakeEngine({GENERATE: lambda body: (200, {"meta_info": info})}) as engine:
        server = server_of(engine)
        answer = await server.get_logprobs(input_ids=[1, 5, 6], top_k=2)
        info.clear()
        with pytest.raises(PromptLogprobsError, match="no prompt logprobs"):
            await server.get_logprobs(input_ids=[1, 5, 6])
        await server.close()

    assert answer == {
        "prompt_tokens": [1, 5, 6],
        "prompt_topk_token_ids": [[], [5, 8], [6, 9, 8]],
        "prompt_topk_logprobs": [[], [-0.5, -2.0], [-3.0, -0.1, -0.2]],
    }
    body = engine.bodies(GENERATE)[0]
    assert (body["logprob_start_len"], body["top_logprobs_num"], body["return_logprob"]) == (0, 2, True)
