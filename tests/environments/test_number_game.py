"""number_game: rules that hold for any guesses, credit for each turn, ends of the game told from ends by a limit."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs import tokenizers
from atroposlib.errors import ConfigError
from atroposlib.testing.mock.policies import Prompt, PromptFunction
from atroposlib.type_definitions import MASKED
from environments.number_game import NumberGameEnv
from environments.number_game.credit import centred, returns_to_go, spread, turns
from environments.number_game.game import Game, new_game, play, read_guess
from tests.environments.running import Stand
from tests.processes import RolloutServerProcess

RANGE = re.compile(r"from 1 to (\d+)")


def bisect(prompt: Prompt) -> str:
    [largest] = map(int, RANGE.findall(prompt.text))
    low, high = 1, largest
    told = re.findall(r"assistant\n(\w+)<\|im_end\|>\n<\|im_start\|>user\n(Higher|Lower)", prompt.text)
    for guess, answer in told:
        low, high = (int(guess) + 1, high) if answer == "Higher" else (low, int(guess) - 1)
    return str((low + high) // 2)


class Players:
    """Every other player bisects; the others say one instead of a number, and go on saying it."""

    def __init__(self) -> None:
        self.games: Counter[str] = Counter()

    def __call__(self, prompt: Prompt) -> str:
        self.games[prompt.text] += prompt.turn == 0
        if "one<|im_end|>" in prompt.text or (prompt.turn == 0 and self.games[prompt.text] % 2 == 0):
            return "one"
        return bisect(prompt)


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    return Stand(NumberGameEnv, PromptFunction(Players()), bytes_tokenizer, group_size=2, max_token_length=4096)


# Rules


@given(
    largest=st.integers(1, 20),
    secret=st.integers(1, 20),
    max_guesses=st.integers(1, 6),
    texts=st.lists(st.integers(-1, 22).map(str) | st.just("no idea"), min_size=6, max_size=6),
)
def test_a_game_ends_in_time_and_pays_between_0_and_1(
    largest: int, secret: int, max_guesses: int, texts: list[str]
) -> None:
    secret = min(secret, largest)
    game, paid = new_game(secret, largest, max_guesses), 0.0
    for text in texts:
        turn = play(game, text)
        game = turn.game
        paid += turn.reward
        assert turn.reward >= 0.0
        assert game.low <= secret <= game.high
        if game.status != "open":
            break

    assert game.guesses <= max_guesses
    assert (game.status == "won") == (text == str(secret))
    assert game.status == "won" or game.guesses == max_guesses
    assert paid <= 1.0 + 1e-9
    assert paid == pytest.approx(1.0) or game.status != "won" or largest == 1


def after(*texts: str, secret: int = 6, largest: int = 8, max_guesses: int = 4) -> tuple[Game, list[str], list[float]]:
    game = new_game(secret, largest, max_guesses)
    answers, rewards = [], []
    for text in texts:
        turn = play(game, text)
        game = turn.game
        answers.append(turn.answer)
        rewards.append(turn.reward)
    return game, answers, rewards


def test_bisection_is_paid_by_the_bits_it_learns() -> None:
    game, answers, rewards = after("4", "7", "6")

    assert game.status == "won"
    assert answers == ["Higher. 3 guesses left.", "Lower. 2 guesses left.", ""]
    assert rewards == pytest.approx([1 / 6, 1 / 6, 1 / 6 + 0.5])


def test_what_is_known_already_pays_nothing_and_costs_a_guess() -> None:
    game, answers, rewards = after("4", "4", "well", "3")

    assert (game.status, game.low, game.high) == ("lost", 5, 8)
    assert answers[2] == "That is no number. 1 guess left."
    assert rewards == pytest.approx([1 / 6, 0, 0, 0])


@pytest.mark.parametrize(
    ("text", "guess"),
    [("7", 7), ("Not 3 but 12.", 12), ("-4", -4), ("", None), ("seven", None), ("9" * 5000, 999999999)],
)
def test_the_last_number_is_the_guess(text: str, guess: int | None) -> None:
    assert read_guess(text) == guess or (len(text) > 9 and text.isdigit())


# Credit

M = MASKED


def test_turns_are_the_runs_that_were_sampled() -> None:
    assert turns([M, M, 5, 6, M, 7]) == [slice(2, 4), slice(5, 6)]
    assert turns([M]) == []


def test_a_turn_is_credited_with_what_came_after_it_and_compared_with_the_same_turn_of_others() -> None:
    masks = [[M, 5, 6, M, 7], [M, 8, M, 9, M, 4]]
    returns = [
        spread(returns_to_go(rewards), row) for rewards, row in zip([[0.5, 0.5], [0.0, 0.0, 0.25]], masks, strict=True)
    ]

    assert returns == [[0, 1.0, 1.0, 0, 0.5], [0, 0.25, 0, 0.25, 0, 0.25]]
    assert centred(returns, masks) == [[0, 0.375, 0.375, 0, 0.125], [0, -0.375, 0, -0.125, 0, 0]]


def test_a_reward_too_many_is_noticed() -> None:
    with pytest.raises(ValueError, match="zip"):
        spread([1.0, 2.0], [M, 5])


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_advantages_of_a_turn_add_up_to_nothing(rewards: list[list[float]]) -> None:
    masks = [[value for turn in range(len(row)) for value in (M, turn)] for row in rewards]
    returns = [spread(returns_to_go(row), mask) for row, mask in zip(rewards, masks, strict=True)]

    advantages = centred(returns, masks)

    for turn in range(4):
        assert sum(row[2 * turn + 1] for row in advantages if len(row) > 2 * turn) == pytest.approx(0, abs=1e-9)


# The whole environment


async def test_process_pays_who_bisects_more_than_who_repeats_itself(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    for group in groups:
        assert min(group["scores"]) == 0.0
        assert max(group["scores"]) == pytest.approx(1.0)
        assert group["finish_reasons"] == ["stop", "stop"], "a lost game is over, not cut short"
        assert group.get("advantages") is None


async def test_every_guess_is_trained_and_no_answer_is(
    stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path, bytes_tokenizer: str
) -> None:
    tokenizer = tokenizers.load_tokenizer(bytes_tokenizer)
    stand.settings |= {"is_credit_per_turn": True}

    batch = await stand.leased(rollout_server, tmp_path / "run")

    for group in batch:
        i = int(group.scores.argmin())
        span = slice(group.cu_seqlens[i], group.cu_seqlens[i + 1])
        tokens, mask = group.tokens[span], group.loss_mask[span].astype(bool)
        assert tokenizer.decode(tokens[mask]) == "one<|im_end|>" * 6
        assert "Higher" not in tokenizer.decode(tokens[mask])
        assert tokenizer.decode(tokens).count("That is no number.") == 5
        assert group.advantages is not None
        assert (group.advantages[span][~mask] == 0).all()
        first = int(mask.argmax())
        assert group.advantages[span][first] == pytest.approx(-0.5)


async def test_evaluate_wins_all_held_out_games_by_bisection(stand: Stand, tmp_path: Path) -> None:
    stand.policy = PromptFunction(bisect)
    stand.settings |= {"max_guesses": 7}

    metrics, samples = await stand.evaluated(tmp_path)

    assert metrics["heldout_won"] == 1.0
    assert metrics["heldout_reward"] == pytest.approx(1.0)
    assert 4 < metrics["heldout_guesses"] <= 7
    assert metrics["heldout_truncated"] == 0
    assert len(samples) == 24


@pytest.mark.parametrize("limit", [{"max_tokens": 1}, {"max_token_length": 200}], ids=["reply", "sequence"])
async def test_a_game_that_a_limit_cut_short_is_truncated(stand: Stand, tmp_path: Path, limit: dict[str, Any]) -> None:
    stand.settings |= {"ensure_scores_are_not_same": False, **limit}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert group["finish_reasons"] == ["length", "length"]
    assert all(1 <= len(turns(masks)) <= 2 for masks in group["masks"])


async def test_held_out_games_are_not_trained_on(stand: Stand, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        env: Any = await stand.env(stack)
        await env.setup()
        drawn = {(await env.get_next_item()).secret for _ in range(500)}

    assert not drawn & {game.secret for game in env.heldout if game.largest == 50}
    assert len(drawn) == 50 - 14


async def test_a_held_out_game_that_nobody_can_win_is_refused(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "games.jsonl").write_text('{"secret": 9, "largest": 8}\n')
    stand.settings |= {"eval_source": str(tmp_path / "games.jsonl")}

    with pytest.raises(ConfigError, match="secret 9"):
        await stand.processed(tmp_path / "groups.jsonl")


async def test_where_every_secret_is_held_out_there_is_nothing_to_train_on(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "games.jsonl").write_text('{"secret": 1, "largest": 2}\n{"secret": 2, "largest": 2}\n')
    stand.settings |= {"eval_source": str(tmp_path / "games.jsonl"), "largest": 2}

    with pytest.raises(ConfigError, match="largest=2"):
        await stand.processed(tmp_path / "groups.jsonl")


async def test_check_env_finds_nothing(stand: Stand) -> None:
    assert await stand.check() == []
