"""sft_loader: rows become groups whose replies alone are trained, without asking any inference server."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from atroposlib.data.chats import tokenized
from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.serving.delivery import drop_reason, is_sft
from atroposlib.errors import ConfigError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from atroposlib.testing.mock.policies import as_policy
from environments.rows import load_rows
from environments.sft_loader import SFTLoaderConfig, SFTLoaderEnv
from environments.sft_loader.env import SAMPLE
from environments.sft_loader.rows import check_rows, form_of, prompt_key
from tests.environments.running import Stand
from tests.processes import RolloutServerProcess

COMPLETIONS = SAMPLE.with_name("completions.jsonl")
TOKENIZER = byte_tokenizer()
CHAT = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    return Stand(SFTLoaderEnv, as_policy("never asked"), bytes_tokenizer, eval_share=0.2)


async def an_env(path: Path, tokenizer_name: str, **settings: Any) -> SFTLoaderEnv:
    config = SFTLoaderConfig(source=str(path), tokenizer_name=tokenizer_name, eval_share=0.2, **settings)
    env = SFTLoaderEnv(config, [APIServerConfig(base_url="http://127.0.0.1:1/v1", server_type="vllm")])
    await env.setup()
    return env


def trained_text(row: dict[str, Any], *, all_turns: bool = False) -> str:
    text = tokenized(row, TOKENIZER, trains_all_turns=all_turns)
    assert len(text.masks) == len(text.tokens)
    return str(TOKENIZER.decode([text.tokens[position] for position in text.trained]))


def test_of_a_chat_the_last_reply_is_trained_or_every_one() -> None:
    assert trained_text(CHAT).strip() == "d<|im_end|>"
    assert "".join(trained_text(CHAT, all_turns=True).split()) == "b<|im_end|>d<|im_end|>"


def test_of_a_completion_its_own_text_and_an_end_are_trained() -> None:
    assert trained_text({"prompt": "a b", "completion": " c"}) == " c<|im_end|>"
    assert trained_text({"prefix": "a b", "completion": " c", "score": 1.0}) == " c<|im_end|>", "atropos-sft-gen"
    assert trained_text({"completion": "c"}) == "c<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "a"},
        {"messages": []},
        {"messages": ["a", "b"]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a"},
        {"prompt": "a", "completion": ""},
        {"prompt": 1, "completion": "a"},
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(row: dict[str, Any]) -> None:
    assert form_of(row) is None
    with pytest.raises(ConfigError, match=r"data, row 2: .*\"messages\""):
        check_rows([CHAT, row], "data")


def test_rows_of_one_prompt_are_of_one_key() -> None:
    one, other = ({"prompt": "a", "completion": text} for text in "bc")

    assert prompt_key(one) == prompt_key(other)
    assert prompt_key({"completion": "b"}) != prompt_key({"completion": "c"}), "nothing in common"
    assert prompt_key(CHAT) == prompt_key({"messages": [*CHAT["messages"][:-1], {"role": "assistant", "content": "x"}]})


@pytest.mark.parametrize("path", [SAMPLE, COMPLETIONS], ids=lambda path: path.stem)
async def test_the_samples_make_groups_that_may_be_sent(path: Path, bytes_tokenizer: str) -> None:
    env = await an_env(path, bytes_tokenizer, group_size=4, epochs=1)
    rows = 0
    while (item := await env.get_next_item()) is not None:
        group, _ = await env.collect_trajectories(item)
        assert group is not None
        assert is_sft(group)
        assert drop_reason(group, env.config, max_token_len=2048) is None, (
            "equal scores, and a last group of another size"
        )
        assert group["advantages"] == group["scores"] == [1.0] * len(group["tokens"])
        rows += len(group["tokens"])
    await env.aclose()

    assert rows + len(env.heldout) == len(load_rows(path, fields={}))


async def test_rows_that_are_too_long_are_left_out(tmp_path: Path, bytes_tokenizer: str) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": str(i), "completion": "x" * (300 if i % 2 else 3)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    env = await an_env(path, bytes_tokenizer, max_token_length=100)

    both, _ = await env.collect_trajectories(rows[:2])
    none, _ = await env.collect_trajectories(rows[1:2])
    await env.aclose()

    assert both is not None
    assert len(both["tokens"]) == 1
    assert none is None


def test_it_takes_only_places_that_others_leave() -> None:
    assert SFTLoaderEnv.config_init()[0].inference_weight == -1.0


async def test_process(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl", groups=3)

    assert [group["scores"] for group in groups] == [[1.0]] * 3
    assert all(group["messages"][0][-1]["role"] == "assistant" for group in groups)


async def test_serve_needs_no_inference_server(
    stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path
) -> None:
    stand.inference_url = "http://127.0.0.1:1/v1"

    batch = await stand.leased(rollout_server, tmp_path / "run")

    assert [group.scores.tolist() for group in batch] == [[1.0]] * 4
    for group in batch:
        assert group.overrides == [{"sft": True}]
        assert group.advantages is not None
        assert set(group.advantages.tolist()) == {1.0}
        assert 0 < int(group.loss_mask.sum()) < group.n_tokens


async def test_evaluate_measures_surprise_at_the_replies(stand: Stand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    nats = metrics["heldout_nats_per_token"]
    assert nats > 0
    assert metrics["heldout_perplexity"] == pytest.approx(math.exp(nats))
    assert metrics["heldout_tokens"] == sum(
        len(tokenized(sample["row"], TOKENIZER, trains_all_turns=False).trained) for sample in samples
    )
    assert 0 < metrics["heldout_size"] == len(samples)


async def test_check_env_finds_nothing(stand: Stand) -> None:
    assert await stand.check() == []
