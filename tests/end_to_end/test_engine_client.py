"""The inference client against a real vLLM: the same wires that the fakes of the other tests speak."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from atroposlib.envs.server_handling.managed_server import ManagedServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.vllm_server import VLLMServer
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.type_definitions import MASKED
from tests.end_to_end.conftest import MODEL, Weights
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
LOGPROB_TOLERANCE = 0.15
"""Nats between bfloat16 in the engine and float32 here."""


@pytest.fixture(scope="module")
def url(vllm_server: str, original: Weights) -> str:
    """Of the server with the model's own weights: other modules leave it with others."""
    publisher = connect([vllm_server], WeightSyncConfig(timeout_s=60))
    publisher.publish(1, original.items())
    publisher.close()
    return vllm_server


@pytest.fixture
async def server(url: str) -> AsyncIterator[VLLMServer]:
    config = APIServerConfig(base_url=f"{url}/v1", model_name=MODEL.name, server_type="vllm")
    client = VLLMServer(config)
    yield client
    await client.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(MODEL))


@pytest.fixture(scope="module")
def reference_logprobs() -> torch.Tensor:
    """[P, V] log-probabilities of the token after each position of PROMPT, from transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], dim=-1)


async def test_sampled_tokens_have_the_logprobs_of_the_model(
    server: VLLMServer, reference_logprobs: torch.Tensor
) -> None:
    samples = await server.sample_tokens(input_ids=PROMPT, n=2, temperature=1.0, max_tokens=1)

    for completion in samples.completions:
        expected = float(reference_logprobs[-1, completion.token_ids[0]])
        assert completion.logprobs[0] == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


async def test_the_prompts_own_logprobs_are_those_of_the_model(
    server: VLLMServer, reference_logprobs: torch.Tensor
) -> None:
    answer = await server.get_logprobs(input_ids=PROMPT, top_k=3)

    assert answer["prompt_tokens"] == PROMPT
    ids, logprobs = answer["prompt_topk_token_ids"], answer["prompt_topk_logprobs"]
    assert len(ids) == len(logprobs) == len(PROMPT)
    assert ids[0] == []  # nothing stands before the first token
    for position in range(1, len(PROMPT)):
        assert len(ids[position]) >= 3
        for token, logprob in zip(ids[position], logprobs[position], strict=True):
            expected = float(reference_logprobs[position - 1, token])
            assert logprob == pytest.approx(expected, abs=LOGPROB_TOLERANCE, rel=0.05)


async def test_chat_and_text_come_over_the_openai_routes(server: VLLMServer) -> None:
    chat = await server.chat_completion(
        messages=[{"role": "user", "content": "Say yes."}], n=2, max_tokens=5, temperature=1.0
    )
    text = await server.completion(prompt="One, two, three,", max_tokens=5, temperature=0.0)

    assert [choice.index for choice in chat.choices] == [0, 1]
    assert all(choice.message.content for choice in chat.choices)
    assert text.choices[0].text


async def test_a_conversation_of_several_turns_is_one_sequence_of_the_sampled_tokens(
    server: VLLMServer, tokenizer: Any
) -> None:
    session = ManagedServer(server, tokenizer=tokenizer)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 2 + 2?"}]
    for question in ("And 3 + 3?", "And 4 + 4?"):
        reply = await session.chat_completion(messages=messages, max_tokens=16, temperature=1.0)
        messages += [
            {"role": "assistant", "content": reply.choices[0].message.content},
            {"role": "user", "content": question},
        ]
    await session.chat_completion(messages=messages, max_tokens=16, temperature=1.0)

    [node] = session.get_state()["nodes"]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert session.segments_restarted == 0
    assert not any(a == b == end_of_turn for a, b in zip(node.tokens, node.tokens[1:], strict=False))
    trained = [i for i, label in enumerate(node.masked_tokens) if label != MASKED]
    assert all(node.logprobs[i] <= 0 for i in trained)
    assert len(trained) >= 3


async def test_the_engine_says_how_busy_it_is_and_which_version_it_runs(server: VLLMServer) -> None:
    load = await server.engine_load()
    version = await server.current_version()

    assert load is not None
    assert load.running >= 0
    assert 0.0 <= load.kv_cache_usage <= 1.0
    assert version == 1
