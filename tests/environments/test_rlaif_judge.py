"""rlaif_judge: no bias for a place, win shares as rewards, and a judge that fails excludes instead of paying 0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs import tokenizers
from atroposlib.envs.processing.limits import ProcessFailedError
from atroposlib.errors import RolloutError
from atroposlib.testing import check_env
from atroposlib.testing.mock.policies import Prompt, PromptFunction
from atroposlib.testing.mock_inference import MockInferenceServer, in_thread
from environments.rlaif_judge import RlaifJudgeEnv
from environments.rlaif_judge.env import SAMPLE
from environments.rlaif_judge.judge import agreed, read_rating, read_verdict
from environments.rlaif_judge.ranking import ring, win_shares
from environments.rows import load_rows
from tests.environments.running import Stand
from tests.processes import RolloutServerProcess

ROWS = load_rows(SAMPLE, fields={"request": str, "reference": str})
PAIR = re.compile(r"<reply_a>\n(.*)\n</reply_a>\n<reply_b>\n(.*)\n</reply_b>", re.S)
ONE = re.compile(r"<reply>\n(.*)\n</reply>", re.S)
LENGTHS = (4, 1, 3, 2)
"""Words of the replies of a group."""


def reply(prompt: Prompt) -> str:
    return " ".join(["word"] * LENGTHS[prompt.index])


def prefer_long(prompt: Prompt) -> str:
    """An honest judge: more words are better."""
    if one := ONE.search(prompt.text):
        return f"Fine.\nRating: {2 * len(one[1].split())}"
    [(a, b)] = PAIR.findall(prompt.text)
    better = "A" if len(a.split()) > len(b.split()) else "B" if len(a.split()) < len(b.split()) else "tie"
    return f"It is longer.\nVerdict: {better}"


def fails_at_one_word(prompt: Prompt) -> str:
    shown = (PAIR.findall(prompt.text) or [ONE.findall(prompt.text)])[0]
    return "I would rather not." if "word" in shown else prefer_long(prompt)


@pytest.fixture
def judge() -> Iterator[MockInferenceServer]:
    with in_thread(MockInferenceServer(PromptFunction(prefer_long))) as server:
        yield server


@pytest.fixture
def stand(bytes_tokenizer: str, judge: MockInferenceServer) -> Stand:
    settings = {"judge_base_url": judge.url, "group_size": 4, "opponents": 2}
    return Stand(RlaifJudgeEnv, PromptFunction(reply), bytes_tokenizer, **settings)


# Verdicts and ranking


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("Verdict: A", 1.0), ("verdict: **B**", 0.0), ("VERDICT: tie.", 0.5), ("Verdict: A? No.\nVerdict: B", 0.0)],
)
def test_the_last_verdict_counts(text: str, verdict: float) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize("text", ["", "A", "Verdict: both", "Verdict: Apples", "Rating: 3"])
def test_no_verdict_is_a_failure_of_the_judge(text: str) -> None:
    with pytest.raises(RolloutError, match="Verdict"):
        read_verdict(text)


@pytest.mark.parametrize(("text", "rating"), [("Rating: 1", 0.0), ("Rating: 10", 1.0), ("rating: **4**/10", 1 / 3)])
def test_ratings_lie_between_0_and_1(text: str, rating: float) -> None:
    assert read_rating(text) == pytest.approx(rating)


@pytest.mark.parametrize("text", ["", "Rating: 0", "Rating: 11", "Rating: good"])
def test_no_rating_is_a_failure_of_the_judge(text: str) -> None:
    with pytest.raises(RolloutError, match="Rating"):
        read_rating(text)


@pytest.mark.parametrize(
    ("first", "second", "result"), [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.0, 0.0, 0.5), (0.5, 0.0, 0.5)]
)
def test_only_who_wins_in_both_places_has_won(first: float, second: float, result: float) -> None:
    assert agreed(first, second) == result


@given(n=st.integers(1, 9), opponents=st.integers(1, 9))
def test_everybody_meets_as_many_and_nobody_twice(n: int, opponents: int) -> None:
    pairs = ring(n, opponents)
    meetings = [sum(i in pair for pair in pairs) for i in range(n)]

    assert len(set(pairs)) == len(pairs)
    assert set(pairs) <= set(combinations(range(n), 2))
    assert set(meetings) <= {min(2 * opponents, n - 1)}


def test_a_comparison_that_failed_counts_for_nobody() -> None:
    assert win_shares(3, {(0, 1): 1.0, (1, 2): None, (0, 2): None}) == [1.0, 0.0, None]


# The whole environment


async def test_process_pays_the_share_of_comparisons_that_were_won(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    assert [group["scores"] for group in groups] == [pytest.approx([1.0, 0.0, 2 / 3, 1 / 3])] * 2


async def test_a_judge_that_always_prefers_the_first_place_pays_everybody_the_same(
    stand: Stand, judge: MockInferenceServer, tmp_path: Path
) -> None:
    judge.policy = PromptFunction(lambda prompt: "Verdict: A")
    stand.settings |= {"ensure_scores_are_not_same": False}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert group["scores"] == [0.5] * 4


async def test_rate_mode_pays_each_reply_by_itself(stand: Stand, tmp_path: Path) -> None:
    stand.settings |= {"judge_mode": "rate"}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert group["scores"] == pytest.approx([7 / 9, 1 / 9, 5 / 9, 3 / 9])


@pytest.mark.parametrize("mode", ["compare", "rate"])
async def test_replies_that_the_judge_cannot_judge_are_left_out(
    stand: Stand, judge: MockInferenceServer, tmp_path: Path, mode: str
) -> None:
    judge.policy = PromptFunction(fails_at_one_word)
    stand.settings |= {"judge_mode": mode, "min_valid_per_group": 2}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert len(group["tokens"]) == 3
    assert 0.0 not in group["scores"] or mode == "compare"
    assert len(set(group["scores"])) == 3


@pytest.mark.parametrize(("mode", "said"), [("compare", "compare 3 of 4"), ("rate", "pay 3 of 4")])
async def test_too_few_judged_replies_are_no_group(
    stand: Stand, judge: MockInferenceServer, mode: str, said: str
) -> None:
    judge.policy = PromptFunction(fails_at_one_word)

    async with AsyncExitStack() as stack:
        env = await stand.env(stack, judge_mode=mode)
        await env.setup()
        with pytest.raises(RolloutError, match=f"{said}.*4 are needed"):
            await env.collect_trajectories(await env.get_next_item())


async def test_without_a_judge_there_is_no_group(stand: Stand, judge: MockInferenceServer, tmp_path: Path) -> None:
    judge.policy = PromptFunction(lambda prompt: "no verdict")

    with pytest.raises(ExceptionGroup) as failure:
        await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert failure.group_contains(ProcessFailedError)


async def test_serve_sends_the_tokens_of_the_replies_and_none_of_the_judge_s(
    stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path, bytes_tokenizer: str
) -> None:
    tokenizer = tokenizers.load_tokenizer(bytes_tokenizer)

    [group] = await stand.leased(rollout_server, tmp_path / "run")

    trained = tokenizer.decode(group.tokens[group.loss_mask.astype(bool)])
    assert trained == "".join(" ".join(["word"] * n) + "<|im_end|>" for n in LENGTHS)
    assert "Verdict" not in tokenizer.decode(group.tokens)
    assert group.scores.tolist() == pytest.approx([1.0, 0.0, 2 / 3, 1 / 3])


async def test_evaluate_compares_with_the_references(stand: Stand, tmp_path: Path) -> None:
    stand.policy = PromptFunction(lambda prompt: "word " * 100)

    metrics, samples = await stand.evaluated(tmp_path)

    assert metrics["heldout_win_rate"] == 1.0
    assert 0 < metrics["heldout_size"] == len(samples) < len(ROWS)


async def test_check_env_finds_nothing_where_the_policy_judges_itself(stand: Stand) -> None:
    def both(prompt: Prompt) -> str:
        return prefer_long(prompt) if "Verdict" in prompt.text else reply(prompt)

    stand.policy = PromptFunction(both)
    stand.settings["judge_base_url"] = None

    assert await stand.check() == []


async def test_check_env_finds_nothing_with_a_judge_of_its_own(stand: Stand, judge: MockInferenceServer) -> None:
    report = await check_env(
        RlaifJudgeEnv, reply=stand.policy, n_items=2, config={"judge_base_url": judge.url, "group_size": 4}
    )

    assert report.findings == []
    assert judge.requests


def test_the_judge_s_key_comes_from_the_environment(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    from environments.rlaif_judge.env import RlaifJudgeConfig, judge_server

    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    config = RlaifJudgeConfig(judge_base_url="http://judge/v1", judge_model="big")

    [server] = judge_server(config).servers

    assert (server.config.api_key, server.config.model_name) == ("s3cret", "big")
    assert "s3cret" not in repr(config)
