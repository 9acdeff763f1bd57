"""Long conversations are shortened from their old end, and what stays is whole."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from atroposlib.utils.message_history_utils import (
    ensure_trajectory_token_limit,
    strip_thinking,
    truncate_thinking,
)
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer


def test_thinking_is_taken_out() -> None:
    assert strip_thinking("<think>a\nb</think> yes <think>c</think>") == "yes"


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("no thinking at all", 0, "no thinking at all"),
        ("<think>short</think> x", 5, "<think>short</think> x"),
        ("<think>one\n\ntwo</think> x", 3, "<think>\n... two\n</think> x"),
        ("<think>one\n\nlonger</think> x", 3, "<think>\n... ger\n</think> x"),
        ("<think>cut in the mid", 3, "<think>\n... mid\n"),
        ("<think>gone</think> x", 0, "<think>\n</think> x"),
    ],
)
def test_thinking_is_cut_to_its_last_paragraph_or_tokens(tokenizer: Any, text: str, limit: int, expected: str) -> None:
    assert truncate_thinking(text, tokenizer, limit) == expected


def a_step(tokenizer: Any, *replies: str, turns: int = 3, **columns: Any) -> dict[str, Any]:
    """Alternatives that differ in their last reply."""
    history = [{"role": "system", "content": "S"}]
    for turn in range(turns):
        history += [{"role": "user", "content": f"obs{turn}"}, {"role": "assistant", "content": f"act{turn}"}]
    histories = [[*history[:-1], {"role": "assistant", "content": reply}] for reply in replies]
    tokenized = [tokenize_for_trainer(tokenizer, messages) for messages in histories]
    return {
        "messages": histories,
        "tokens": [one["tokens"] for one in tokenized],
        "masks": [one["masks"] for one in tokenized],
        "seed": 1,
        "parsed_actions": list(replies),
        **columns,
    }


def test_a_step_that_fits_is_untouched(tokenizer: Any) -> None:
    step = a_step(tokenizer, "x", "y")

    assert ensure_trajectory_token_limit([step], tokenizer, 1000)[0] is step


def test_all_alternatives_lose_the_same_oldest_turns(tokenizer: Any) -> None:
    step = a_step(tokenizer, "x", "long reply", inference_logprobs=[[0.0], [0.0]])
    limit = len(a_step(tokenizer, "long reply", turns=2)["tokens"][0])

    [short] = ensure_trajectory_token_limit([step], tokenizer, limit)

    contents = [[message["content"] for message in messages] for messages in short["messages"]]
    assert contents == [["S", "obs1", "act1", "obs2", "x"], ["S", "obs1", "act1", "obs2", "long reply"]]
    assert max(map(len, short["tokens"])) == limit
    assert [len(row) for row in short["masks"]] == [len(row) for row in short["tokens"]]
    assert short["inference_logprobs"] is None, "it belonged to the old tokens"
    assert short["seed"] == 1
    assert len(step["messages"][0]) == 7, "the caller's step is its own"


def test_a_step_that_cannot_fit_is_left_out(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    steps = [a_step(tokenizer, "x" * 500), a_step(tokenizer, "y", turns=1)]

    with caplog.at_level(logging.WARNING):
        kept = ensure_trajectory_token_limit(steps, tokenizer, 200)

    assert kept == [steps[1]]
    assert "step 0" in caplog.text
