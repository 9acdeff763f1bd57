"""The helpers that environments import from atroposlib.utils, as they call them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, Field

from atroposlib.utils.advantages import (
    allclose_to_first,
    compute_discounted_returns,
    compute_grpo_process_supervision_advantages,
    compute_stats,
)
from atroposlib.utils.best_of_n_selection import select_best_index
from atroposlib.utils.cli import adjust_model_defaults, extract_namespace, get_prefixed_pydantic_model, merge_dicts
from atroposlib.utils.display import display_metrics_table
from atroposlib.utils.io import parse_http_response
from atroposlib.utils.message_history_utils import ensure_trajectory_token_limit, strip_thinking, truncate_thinking
from atroposlib.utils.metrics import get_std_min_max_avg
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES, tokenize_for_trainer
from atroposlib.utils.tool_call_parser import parse_tool_call

CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]

# tokenize_for_trainer


def trained(tokenizer: Any, made: dict[str, Any]) -> str:
    assert all(mask in (-100, token) for token, mask in zip(made["tokens"], made["masks"], strict=True))
    return str(tokenizer.decode([mask for mask in made["masks"] if mask != -100]))


def test_tokens_are_plain_ids_and_the_last_turn_is_trained(tokenizer: Any) -> None:
    made = tokenize_for_trainer(tokenizer, CHAT)

    assert tokenizer.decode(made["tokens"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert trained(tokenizer, made).strip() == "d<|im_end|>"
    assert "messages" not in made


@pytest.mark.parametrize("include", [True, False])
def test_the_third_positional_asks_for_the_messages(include: bool, tokenizer: Any) -> None:
    assert ("messages" in tokenize_for_trainer(tokenizer, CHAT, include)) is include


def test_all_assistant_turns_are_trained_where_asked(tokenizer: Any) -> None:
    made = tokenize_for_trainer(tokenizer, CHAT, train_on_all_assistant_turns=True)

    assert trained(tokenizer, made).replace("\n", "") == "b<|im_end|>d<|im_end|>"


def test_a_reply_that_was_cut_loses_its_terminator(tokenizer: Any) -> None:
    made = tokenize_for_trainer(tokenizer, CHAT, finish_reason="length")

    assert trained(tokenizer, made) == "d"
    assert len(made["tokens"]) == len(made["masks"])


def test_tuples_of_messages_are_chats_too(tokenizer: Any) -> None:
    assert tokenize_for_trainer(tokenizer, tuple(CHAT)) == tokenize_for_trainer(tokenizer, CHAT)


def test_the_roles_that_are_the_policys() -> None:
    assert set(UNMASKED_ROLES) == {"assistant", "agent"}


# Advantages


def test_statistics_of_jagged_lists() -> None:
    assert compute_stats([1.0, [2.0, 3.0]]) == {"mean": 2.0, "var": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match=r"empty|no numbers|at least"):
        compute_stats([])


def test_returns_are_discounted_from_the_end() -> None:
    assert compute_discounted_returns(np.array([1.0, 1.0, 1.0]), 0.5).tolist() == [1.75, 1.5, 1.0]


def test_process_advantages_are_normalised_over_all_steps_then_summed_to_the_end() -> None:
    first, second = compute_grpo_process_supervision_advantages([[0.0, 1.0], [1.0]])

    std = np.std([0.0, 1.0, 1.0])
    low, high = (0 - 2 / 3) / std, (1 - 2 / 3) / std
    assert first == pytest.approx([low + high, high])
    assert second == pytest.approx([high])
    with pytest.raises(ValueError, match=r"std|spread|equal"):
        compute_grpo_process_supervision_advantages([[1.0], [1.0]])


def test_values_are_compared_with_the_first() -> None:
    assert allclose_to_first([1.0, 1.0 + 1e-9])
    assert not allclose_to_first([1.0, 2.0])
    assert list(allclose_to_first([1.0, 2.0, 1.0], return_vector=True)) == [True, False, True]  # type: ignore[arg-type]


# Selection


@pytest.mark.parametrize(
    ("primary", "secondary", "flags", "best"),
    [
        ([1.0, 2.0], [0, 0], (), 1),
        ([2.0, 2.0], [5, 3], (), 1),
        ([2.0, 2.0], [3, 3], (), 0),
        ([1.0, 2.0], [0, 0], (False,), 0),
        ([2.0, 2.0], [3, 5], (True, False), 1),
    ],
)
def test_the_best_of_n(primary: list[float], secondary: list[float], flags: Any, best: int) -> None:
    assert select_best_index(primary, secondary, *flags) == best


@pytest.mark.parametrize(("primary", "secondary"), [([], []), ([1.0], [])])
def test_no_best_of_nothing_or_of_unequal_lists(primary: list[float], secondary: list[float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        select_best_index(primary, secondary)


# Tool calls


def test_a_tool_call_is_read_with_or_without_a_list_of_tools() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": "it\'s"}}</tool_call>'

    assert parse_tool_call(text) == ("f", {"x": "it's"}, False)
    assert parse_tool_call(text, [{"type": "function", "function": {"name": "f"}}]) == ("f", {"x": "it's"}, False)
    assert parse_tool_call(text, [{"name": "g"}]) == ("-ERROR-", {}, True)
    assert parse_tool_call("no call") == ("-ERROR-", {}, True)
    assert parse_tool_call('<do>{"name": "f", "arguments": {}}</do>', [], ["do"]) == ("f", {}, False)


# Histories


def test_thinking_is_stripped_and_truncated(tokenizer: Any) -> None:
    text = "<think>first part\n\nlast</think>so"

    assert strip_thinking(text) == "so"
    assert truncate_thinking(text, tokenizer, 100) == text
    assert "last" in truncate_thinking(text, tokenizer, 8)
    assert "first" not in truncate_thinking(text, tokenizer, 8)
    assert truncate_thinking("<think>abcdefgh</think>so", tokenizer, 3).startswith("<think>")
    assert "... " in truncate_thinking("<think>abcdefgh</think>so", tokenizer, 3)


def test_a_trajectory_within_its_limit_is_kept_and_a_hopeless_step_dropped(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = tokenize_for_trainer(tokenizer, messages)
    step: Any = {
        "messages": [messages],
        "tokens": [made["tokens"]],
        "masks": [made["masks"]],
        "seed": 1,
        "parsed_actions": [0],
    }

    assert ensure_trajectory_token_limit([step], tokenizer, 1000) == [step]
    assert ensure_trajectory_token_limit([step], tokenizer, 3) == []


# Small things


def test_figures_are_added_to_a_dictionary() -> None:
    metrics: dict[str, float] = {"own": 1}
    get_std_min_max_avg("x", [1.0, 3.0], metrics)

    assert metrics == {"own": 1, "x_mean": 2.0, "x_std": 1.0, "x_max": 3.0, "x_min": 1.0}


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    display_metrics_table("task", {"accuracy": 0.5}, 0.0, 2.0)

    shown = capsys.readouterr().out
    assert "task" in shown
    assert "|" in shown
    assert "0.5" in shown


class Model(BaseModel):
    group_size: int = Field(default=4, ge=1, description="how many")
    name: str | None = None


def test_a_prefixed_model_keeps_type_default_and_description() -> None:
    fields = get_prefixed_pydantic_model(Model, "env.").model_fields

    assert set(fields) == {"env.group_size", "env.name"}
    field = fields["env.group_size"]
    assert (field.default, field.description, field.annotation) == (4, "how many", int)


def test_dictionaries_are_merged_in_depth() -> None:
    assert merge_dicts({"a": {"b": 1, "c": 1}}, {"a": {"c": 2}}, {"d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_a_namespace_is_taken_out() -> None:
    assert extract_namespace({"env.group_size": 8, "openai.x": 1}, "env.") == {"group_size": 8}


def test_defaults_are_adjusted() -> None:
    assert adjust_model_defaults(Model, Model(group_size=16))().model_dump()["group_size"] == 16


@pytest.mark.parametrize("is_broken", [False, True])
async def test_an_answer_is_parsed_and_an_error_raised_as_it_is(is_broken: bool) -> None:
    class Answer(SimpleNamespace):
        def raise_for_status(self) -> None:
            if is_broken:
                raise RuntimeError("503")

        async def json(self) -> Any:
            return {"ok": True}

        async def text(self) -> str:
            return "body"

    answer = Answer(status=200)
    if not is_broken:
        assert await parse_http_response(answer) == {"ok": True}
        return
    with pytest.raises(RuntimeError, match="503"):
        await parse_http_response(answer)
