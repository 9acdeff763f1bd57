"""The mock and the SDK's clients were written apart; on every engine's wire they understand each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.testing.mock.codec import ByteCodec
from atroposlib.testing.mock_inference import MockInferenceServer

REPLY = "that is"
IDS = [*ByteCodec().encode(REPLY), 2]
VERSIONED = ("vllm", "sglang")


@pytest.fixture
async def manager(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ServerManager]:
    async with MockInferenceServer(REPLY, weight_version="3") as engine:
        config = APIServerConfig(
            base_url=engine.root_url if request.param == "trl" else engine.url,
            server_type=request.param,
            tokenizer_name=save_byte_tokenizer(tmp_path / "tokenizer"),
            timeout=10,
        )
        manager = ServerManager([config])
        yield manager
        await manager.close()


@pytest.mark.parametrize("manager", ["openai", "vllm", "sglang", "trl"], indirect=True)
async def test_health_chat_and_completions(manager: ServerManager) -> None:
    await manager.servers[0].check_health()
    chat = await manager.chat_completion(messages=[{"role": "user", "content": "hi"}], n=2, max_tokens=20)
    cut = await manager.completion(prompt="hi", max_tokens=4)

    assert [(choice.message.content or "").removesuffix("<|im_end|>") for choice in chat.choices] == [REPLY] * 2
    assert [choice.finish_reason for choice in chat.choices] == ["stop", "stop"]
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("that", "length")


@pytest.mark.parametrize("manager", ["vllm", "sglang", "trl"], indirect=True)
async def test_tokens_logprobs_and_versions(manager: ServerManager) -> None:
    is_versioned = manager.servers[0].config.server_type in VERSIONED
    samples = await manager.sample_tokens(input_ids=[5, 6], n=2, max_tokens=20)

    assert [completion.token_ids for completion in samples.completions] == [IDS, IDS]
    assert samples.completions[0].logprobs == [-0.25 * k for k in range(1, 9)]
    assert samples.completions[0].versions == [(3 if is_versioned else -1, len(IDS))]


@pytest.mark.parametrize("manager", VERSIONED, indirect=True)
async def test_logprobs_of_a_prompt(manager: ServerManager) -> None:
    answer = await manager.get_logprobs(input_ids=[5, 6, 7], top_k=2)

    assert answer["prompt_topk_token_ids"] == [[], [6, 7], [7, 8]]
