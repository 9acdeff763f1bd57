"""The fixtures that authors get."""

from __future__ import annotations

from typing import Any

import httpx

from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.testing.fixtures import mock_inference, tokenizer, tokenizer_name
from atroposlib.testing.mock.policies import Script
from atroposlib.testing.mock_inference import MockInferenceServer

__all__ = ["mock_inference", "tokenizer", "tokenizer_name"]


def test_the_server_can_be_scripted_by_a_synchronous_test(mock_inference: MockInferenceServer) -> None:
    mock_inference.policy = Script(("hello",))

    answer = httpx.post(f"{mock_inference.url}/completions", json={"prompt": "a"}, timeout=5)

    assert answer.json()["choices"][0]["text"] == "hello"


def test_the_tokenizer_and_its_folder_agree(tokenizer: Any, tokenizer_name: str) -> None:
    assert load_tokenizer(tokenizer_name).encode("hé") == tokenizer.encode("hé")
