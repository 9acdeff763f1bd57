"""A chat becomes plain ids, and the mask covers what the policy said and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.errors import ConfigError
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES, tokenize_for_trainer, tokenize_for_trainer_dpo

ONE_TURN = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "Yes."}]


def trained_text(tokenizer: Any, result: dict[str, Any]) -> list[str]:
    """The runs of trained tokens, as text."""
    runs: list[list[int]] = []
    was_trained = False
    for token, mask in zip(result["tokens"], result["masks"], strict=True):
        assert mask in (-100, token)
        if mask != -100:
            if not was_trained:
                runs.append([])
            runs[-1].append(token)
        was_trained = mask != -100
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", ["tokenizer", "smollm"])
def test_the_last_reply_is_trained_with_its_terminator(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)

    result = tokenize_for_trainer(tokenizer, TWO_TURNS)

    assert all(isinstance(token, int) for token in result["tokens"])
    assert tokenizer.decode(result["tokens"]) == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert trained_text(tokenizer, result) == ["Yes.<|im_end|>\n"]
    assert sorted(result) == ["masks", "tokens"]


@pytest.mark.parametrize("name", ["tokenizer", "smollm"])
def test_every_turn_of_the_policy_is_trained_when_asked(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)

    result = tokenize_for_trainer(tokenizer, TWO_TURNS, train_on_all_assistant_turns=True)

    assert trained_text(tokenizer, result) == ["It is 4.<|im_end|>\n", "Yes.<|im_end|>\n"]


def test_agents_speak_for_the_policy_and_tools_do_not(tokenizer: Any) -> None:
    # The generation prompt says "assistant" whatever the role, so only what follows the role's name is compared.
    chat = [*ONE_TURN, {"role": "tool", "content": "5"}, {"role": "agent", "content": "five"}]

    result = tokenize_for_trainer(tokenizer, chat, train_on_all_assistant_turns=True)

    assert UNMASKED_ROLES == ["assistant", "agent"]
    assert "five<|im_end|>" in trained_text(tokenizer, result)[-1]
    assert not any("5" in run for run in trained_text(tokenizer, result))


@pytest.mark.parametrize("name", ["tokenizer", "smollm"])
def test_a_reply_that_was_cut_is_not_taught_to_end(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)

    cut = tokenize_for_trainer(tokenizer, ONE_TURN, finish_reason="length")
    stopped = tokenize_for_trainer(tokenizer, ONE_TURN, finish_reason="stop")

    assert trained_text(tokenizer, cut) == ["It is 4."]
    assert trained_text(tokenizer, stopped) == ["It is 4.<|im_end|>\n"]


def test_a_template_without_terminator_loses_nothing_of_a_cut_reply() -> None:
    tokenizer = Template(lambda messages: "".join(m["content"] for m in messages), "")

    result = tokenize_for_trainer(tokenizer, ONE_TURN, finish_reason="length")

    assert "".join(chr(token) for token in result["masks"] if token != -100) == "It is 4."


def test_chats_may_be_tuples_and_messages_item_pairs(tokenizer: Any) -> None:
    frozen = tuple(frozenset(message.items()) for message in ONE_TURN)

    assert tokenize_for_trainer(tokenizer, frozen) == tokenize_for_trainer(tokenizer, ONE_TURN)


def test_the_messages_come_along_when_asked(tokenizer: Any) -> None:
    assert tokenize_for_trainer(tokenizer, ONE_TURN, True)["messages"] == ONE_TURN


def test_an_empty_chat_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="empty chat"):
        tokenize_for_trainer(tokenizer, [])


class Template:
    """One id a character. Renders with a function; `prompt` is what a generation prompt adds."""

    name_or_path = "a-template"
    eos_token_id: int | None = None

    def __init__(self, render: Any, prompt: str, wrap: Any = lambda ids: ids) -> None:
        self.render, self.prompt, self.wrap = render, prompt, wrap

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool, **kwargs: Any) -> Any:
        text = self.render(messages) + (self.prompt if add_generation_prompt else "")
        return self.wrap([ord(letter) for letter in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def dropping_old_thinking(messages: Any) -> str:
    """As templates of reasoning models do: only the newest message keeps its thinking."""
    last = len(messages) - 1
    return "".join(
        f"<{m['role']}>{m['content'] if i == last else m['content'].split('</think>')[-1]}|"
        for i, m in enumerate(messages)
    )


def test_a_template_that_rewrites_history_is_named_instead_of_masked_wrongly() -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    tokenizer = Template(dropping_old_thinking, "<assistant>")

    last_only = tokenize_for_trainer(tokenizer, chat)

    assert tokenizer.decode([token for token in last_only["masks"] if token != -100]) == "d|"
    with pytest.raises(ConfigError, match=r"a-template.*message 1 differently"):
        tokenize_for_trainer(tokenizer, chat, train_on_all_assistant_turns=True)


def test_a_template_that_depends_on_what_follows_is_named_too() -> None:
    counting = Template(lambda messages: f"{len(messages)}:" + "".join(m["content"] for m in messages), ">")

    with pytest.raises(ConfigError, match="message 1 differently"):
        tokenize_for_trainer(counting, ONE_TURN)


def test_an_empty_reply_that_was_cut_leaves_the_prompt_whole() -> None:
    tokenizer = Template(lambda messages: "".join(f"{m['content']}| " for m in messages if m["content"]), "")
    tokenizer.eos_token_id = ord("|")

    result = tokenize_for_trainer(
        tokenizer, [ONE_TURN[0], {"role": "assistant", "content": ""}], finish_reason="length"
    )

    assert tokenizer.decode(result["tokens"]) == "2+2?| "


def test_a_prompt_that_opens_a_thinking_block_does_not_shift_the_mask() -> None:
    render = lambda messages: "".join(f"<{m['role']}>{m['content']}|" for m in messages)  # noqa: E731
    tokenizer = Template(render, "<assistant>~think~")

    result = tokenize_for_trainer(tokenizer, ONE_TURN)

    assert tokenizer.decode([token for token in result["masks"] if token != -100]) == "It is 4.|"


@pytest.mark.parametrize("wrap", [lambda ids: {"input_ids": ids}, lambda ids: [ids]], ids=["mapping", "batch of one"])
def test_ids_are_found_in_what_other_tokenizers_return(wrap: Any) -> None:
    render = lambda messages: "".join(f"<{m['role']}>{m['content']}|" for m in messages)  # noqa: E731
    plain, wrapped = (Template(render, "<assistant>", w) for w in (lambda ids: ids, wrap))

    assert tokenize_for_trainer(wrapped, ONE_TURN) == tokenize_for_trainer(plain, ONE_TURN)


def test_something_that_is_not_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a list of token ids"):
        tokenize_for_trainer(Template(lambda messages: "ab", "", wrap=lambda ids: "ab"), ONE_TURN)


def test_a_preference_pair_shares_its_masked_prompt(tokenizer: Any) -> None:
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}

    columns = tokenize_for_trainer_dpo(tokenizer, pair, max_length=1000)

    for side in ("chosen", "rejected"):
        labels = [label for label in columns[f"{side}_labels"] if label != -100]
        assert tokenizer.decode(labels) == f"{pair[side]}<|im_end|>\n"
        assert len(columns[f"{side}_attention_mask"]) == len(columns[f"{side}_input_ids"])
    assert columns["chosen_input_ids"][: len(columns["prompt_input_ids"])] == columns["prompt_input_ids"]
    assert len(tokenize_for_trainer_dpo(tokenizer, pair, max_length=5)["chosen_labels"]) == 5
