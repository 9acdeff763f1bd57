"""The bodies that VllmControl sends and what it makes of vLLM's answers. A FAKE transport, with answers as vLLM 0.32 gives them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from trainer.weight_sync.engines.sampling import Completion
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import ServerSyncError
from trainer.weight_sync.states import Edge


class Answers:
    def __init__(self, status: int, answer: Any) -> None:
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        self._response = status, answer
        self.control = VllmControl("http://engine/v1", transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        self.bodies.append(json.loads(request.content or b"null"))
        return httpx.Response(self._response[0], json=self._response[1])


def scored(*pairs: tuple[int, float]) -> list[Any]:
    return [None, *({str(token): {"logprob": logprob, "rank": 1, "decoded_token": "x"}} for token, logprob in pairs)]


def test_prompt_logprobs_are_those_of_the_prompts_own_tokens() -> None:
    prompt_logprobs = scored((5, -1.5), (6, -0.25))
    prompt_logprobs[2]["9"] = {"logprob": -0.1, "rank": 1, "decoded_token": "likelier"}
    answers = Answers(200, {"choices": [{"index": 0, "prompt_logprobs": prompt_logprobs}]})

    assert answers.control.prompt_logprobs([4, 5, 6], timeout_s=1) == [-1.5, -0.25]
    assert answers.paths == ["/v1/completions"]
    assert answers.bodies == [{"prompt": [4, 5, 6], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}]


def test_an_adapter_is_asked_by_name() -> None:
    answers = Answers(200, {"choices": [{"index": 0, "prompt_logprobs": scored((5, -1.0))}]})

    answers.control.prompt_logprobs([4, 5], model="pol", timeout_s=1)

    assert answers.bodies[0]["model"] == "pol"


@pytest.mark.parametrize("found", [None, scored((5, -1.5)), scored((5, -1.5), (7, -0.2))])
def test_an_answer_without_the_prompts_logprobs_is_an_error_of_the_server(found: Any) -> None:
    answers = Answers(200, {"choices": [{"index": 0, "prompt_logprobs": found}]})

    with pytest.raises(ServerSyncError, match=r"http://engine .* gave no logprobs of the prompt") as raised:
        answers.control.prompt_logprobs([4, 5, 6], timeout_s=1)
    assert raised.value.edge is Edge.VERIFY


def test_completions_come_in_the_order_of_their_prompts() -> None:
    choices = [
        {"index": index, "token_ids": [index, 7], "logprobs": {"token_logprobs": [-1.0, -index]}} for index in (1, 0)
    ]
    answers = Answers(200, {"choices": choices})

    found = answers.control.sample([[1], [2]], max_tokens=2, temperature=0.7, seed=3, timeout_s=1)

    assert found == [Completion([0, 7], [-1.0, 0]), Completion([1, 7], [-1.0, -1])]
    assert answers.bodies[0] == {
        "prompt": [[1], [2]],
        "max_tokens": 2,
        "temperature": 0.7,
        "seed": 3,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@pytest.mark.parametrize(
    "choice", [{"index": 0, "logprobs": {"token_logprobs": [-1.0]}}, {"index": 0, "token_ids": [1], "logprobs": None}]
)
def test_a_completion_without_ids_or_logprobs_is_an_error_of_the_server(choice: Any) -> None:
    with pytest.raises(ServerSyncError, match="no token ids or no logprobs"):
        Answers(200, {"choices": [choice]}).control.sample([[1]], max_tokens=1, temperature=1.0, timeout_s=1)


def test_a_conversation_is_rendered_by_the_server() -> None:
    answers = Answers(200, {"tokens": [1, 2, 3], "count": 3})

    assert answers.control.chat_token_ids([{"role": "user", "content": "hi"}], timeout_s=1) == [1, 2, 3]
    assert answers.bodies == [{"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}]


def test_a_missing_route_names_the_switch_that_opens_it() -> None:
    with pytest.raises(ServerSyncError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        Answers(404, {}).control.load_adapter("pol", "/adapters/1", timeout_s=1)
    with pytest.raises(ServerSyncError, match="VLLM_SERVER_DEV_MODE=1"):
        Answers(404, {}).control.load_folder("/weights/1", "1", timeout_s=1)


def test_adapters_are_listed_with_their_folders_and_the_base_model_is_none_of_them() -> None:
    cards = [{"id": "base", "root": "/models/base", "parent": None}, {"id": "pol", "root": "/w/v1", "parent": "base"}]

    assert Answers(200, {"object": "list", "data": cards}).control.adapters(timeout_s=1) == {"pol": "/w/v1"}


def test_a_folder_is_loaded_and_then_named() -> None:
    answers = Answers(200, {"results": [None], "success": True})

    answers.control.load_folder("/weights/v3", "3", timeout_s=7)

    assert answers.paths == ["/collective_rpc", "/update_weight_version"]
    assert answers.bodies == [
        {"method": "reload_weights", "kwargs": {"weights_path": "/weights/v3"}, "timeout": 7},
        {"new_version": "3"},
    ]


@pytest.mark.parametrize(
    "found", [[], [{"index": "x"}], [{"token_ids": [1], "logprobs": {"token_logprobs": []}}], "no"]
)
def test_an_answer_of_another_form_is_an_error_of_the_server(found: Any) -> None:
    with pytest.raises(ServerSyncError, match="no token ids or no logprobs"):
        Answers(200, {"choices": found}).control.sample([[1]], max_tokens=1, temperature=1.0, timeout_s=1)
    with pytest.raises(ServerSyncError, match="no number"):
        Answers(200, {"world_size": found}).control.world_size(timeout_s=1)
