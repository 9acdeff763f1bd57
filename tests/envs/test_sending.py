"""handle_send_to_api: what becomes of a group between the environment and the loop that sends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs.base import ScoredDataGroup
from atroposlib.errors import ConfigError
from tests.envs.fakes import CountingEnv, a_scored_group

MakeEnv = Callable[..., CountingEnv]


class FakeLink:
    """A loop that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[list[ScoredDataGroup]] = []
        self.reasons: list[str | None] = []

    def note_group(self, group: ScoredDataGroup, trained: Sequence[int], reason: str | None) -> None:
        self.reasons.append(reason)

    async def send(self, groups: Sequence[ScoredDataGroup]) -> None:
        self.sent.append(list(groups))


def linked(env: CountingEnv) -> FakeLink:
    link: Any = FakeLink()
    env.run_link = link
    return link  # type: ignore[no-any-return]


async def test_one_group_a_list_and_nones_are_sent(make_env: MakeEnv) -> None:
    env = make_env()
    link = linked(env)
    one, two = a_scored_group(), a_scored_group((1.0, 0.5))

    await env.handle_send_to_api(one)
    await env.handle_send_to_api([one, None, two])
    await env.handle_send_to_api(None)
    await env.handle_send_to_api([None])

    assert link.sent == [[one], [one, two]]


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (a_scored_group((0.0, 0.5, 1.0)), "wrong_size"),
        (a_scored_group((1.0, 1.0)), "zero_variance"),
        (a_scored_group(length=50), "too_long"),
        ({**a_scored_group((0.0, 0.5, 1.0)), "group_overrides": {"group_size": 3}}, None),
        ({**a_scored_group(), "group_overrides": None}, None),
        ({**a_scored_group((1.0,)), "group_overrides": {"sft": True}}, None),
        ({**a_scored_group((1.0, 1.0, 1.0)), "overrides": [{"sft": True}] * 3}, None),
        ({**a_scored_group((1.0, 1.0, 1.0)), "overrides": [{"sft": True}, None, {}]}, "wrong_size"),
    ],
)
async def test_which_groups_are_sent(make_env: MakeEnv, group: Any, reason: str | None) -> None:
    env = make_env()
    env.max_token_len = 40
    link = linked(env)

    await env.handle_send_to_api(group)

    assert link.reasons == [reason]
    assert bool(link.sent) is (reason is None)


async def test_length_is_no_reason_where_the_caller_says_so_or_no_limit_is_known(make_env: MakeEnv) -> None:
    env = make_env()
    link = linked(env)
    await env.handle_send_to_api(a_scored_group(length=50))
    env.max_token_len = 40
    await env.handle_send_to_api(a_scored_group(length=50), abort_on_any_max_length_exceeded=False)

    assert len(link.sent) == 2


async def test_what_is_too_long_still_counts_among_the_lengths(make_env: MakeEnv) -> None:
    env = make_env()
    env.max_token_len = 40
    linked(env)

    await env.handle_send_to_api([a_scored_group(length=50), a_scored_group((1.0, 1.0)), a_scored_group(length=5)])

    assert env.completion_lengths == [48, 48, 3, 3]


async def test_absent_columns_become_none_and_what_is_given_stays(make_env: MakeEnv) -> None:
    env = make_env()
    link = linked(env)
    group: Any = {**a_scored_group(), "overrides": [{"a": 1}, {}], "own_key": 5}

    await env.handle_send_to_api(group)

    sent: Any = link.sent[0][0]
    assert {name: sent[name] for name in ("ref_logprobs", "group_overrides", "distill_token_ids", "distill_logprobs")} == {
        "ref_logprobs": None, "group_overrides": None, "distill_token_ids": None, "distill_logprobs": None,
    }  # fmt: skip
    assert (sent["overrides"], sent["own_key"]) == ([{"a": 1}, {}], 5)


async def test_messages_are_filled_only_where_asked_for_and_absent(make_env: MakeEnv, tokenizer: Any) -> None:
    env = make_env(include_messages=True)
    env.tokenizer = tokenizer
    link = linked(env)
    text = [*tokenizer.encode("hello")]
    group: ScoredDataGroup = {"tokens": [text, text], "masks": [text, text], "scores": [0.0, 1.0]}

    await env.handle_send_to_api({**group})
    await env.handle_send_to_api({**group, "messages": ["mine", "mine"]})

    assert link.sent[0][0]["messages"] == [[{"role": "user", "content": "hello"}]] * 2
    assert link.sent[1][0]["messages"] == ["mine", "mine"]


async def test_groups_go_to_the_file_also_when_they_are_not_sent(make_env: MakeEnv, tmp_path: Path) -> None:
    taken = tmp_path / "sub" / "groups.jsonl"
    taken.parent.mkdir()
    taken.write_text("of an earlier run\n")
    env = make_env(data_path_to_save_groups=str(taken))
    link = linked(env)
    assert [entry.name for entry in taken.parent.iterdir()] == ["groups.jsonl"]

    await env.handle_send_to_api(a_scored_group(), do_send_to_api=False)

    assert link.sent == []
    written = taken.with_name("groups_1.jsonl")
    assert env.config.data_path_to_save_groups == str(written)
    # Flushed: another process can read it while the environment runs.
    [line] = [json.loads(line) for line in written.read_text().splitlines()]
    assert line["scores"] == [0.0, 1.0]
    assert line["ref_logprobs"] is None
    await env.aclose()


async def test_outside_of_a_run_sending_says_how_to_start_one(make_env: MakeEnv) -> None:
    with pytest.raises(ConfigError, match=r"connected to no run.*serve"):
        await make_env().handle_send_to_api(a_scored_group())


async def test_an_override_of_add_rollouts_is_called_with_group_and_item(make_env: MakeEnv) -> None:
    env = make_env(use_wandb=False)
    linked(env)
    seen: list[Any] = []

    async def add(self: Any, scored_data: Any, item: Any = None) -> None:
        seen.append((scored_data["scores"], item))

    type(env).add_rollouts_for_wandb = add  # type: ignore[method-assign]

    await env.handle_send_to_api(a_scored_group(), "the item")

    assert seen == [([0.0, 1.0], "the item")]
