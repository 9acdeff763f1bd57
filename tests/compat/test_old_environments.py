"""Environments in the style of Atropos 0.4.0, unchanged: every mode, a trainer of today and an old one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from atroposlib.testing.byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer, PromptFunction, in_thread
from tests.compat.old_environments.lives import (
    GROUPS_TO_PROCESS,
    STEPS,
    SUM,
    Life,
    Row,
    Style,
    World,
    answer,
    rows_of_columns,
    rows_of_json,
)
from tests.processes import RolloutServerProcess

pytestmark = pytest.mark.timeout(120)

VLLM = ("--openai.server_type", "vllm")
TEACHER = (
    "--teacher.base_url", "ENGINE", "--teacher.server_type", "vllm", "--teacher.tokenizer_name", "TOKENIZER",
)  # fmt: skip
STYLES = {
    style.script: style
    for style in (
        Style("chat_group"),
        Style("one_trajectory", flags=("--openai.server_type", "openai")),
        Style("managed_group"),
        Style("managed_game"),
        Style("text_completion", flags=VLLM),
        Style("stages"),
        Style("mixed_sizes", batch_size=12),
        Style("sft_rows"),
        Style("token_advantages"),
        Style("distillation", flags=TEACHER),
        Style("several_groups"),
        Style("pictures"),
        Style("wandb_tables", wandb_project="a-project"),
    )
}
WITH_LOGPROBS = {"managed_group", "managed_game", "mixed_sizes", "token_advantages", "distillation"}
EVALUATIONS = {
    "chat_group": {"eval/percent_correct": 1.0},
    "one_trajectory": {"eval/right": 1.0},
    "managed_group": {"eval/right": 1.0},
    "managed_game": None,
    "text_completion": {"eval/right": 1.0},
    "stages": {"eval/drafted": 1.0},
    "mixed_sizes": {"eval/sizes": 3.0},
    "sft_rows": None,
    "token_advantages": None,
    "distillation": {"eval/right": 1.0},
    "several_groups": {"eval/turns": 4.0},
    "pictures": {"eval/pictures": 1.0},
    "wandb_tables": {"eval/percent_correct": 1.0},
}
"""None: nothing that could be known beforehand."""
GROUP_KEYS = {
    "tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params", "inference_logprobs",
    "overrides", "group_overrides", "images", "env_id", "distill_token_ids", "distill_logprobs",
}  # fmt: skip
TOKENIZER = byte_tokenizer()

every_style = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    servers = [RolloutServerProcess(folder / name) for name in ("native", "old")]
    policy = PromptFunction(answer)
    with ExitStack() as clean_up:
        engines = [
            clean_up.enter_context(in_thread(MockInferenceServer(policy, weight_version=version, keeps_requests=False)))
            for version in ("0", "default")
        ]
        for server in servers:
            clean_up.callback(server.kill)
            server.start()
        tokenizer = save_byte_tokenizer(folder / "tokenizer")
        yield World(engines[0].url, engines[1].url, servers[0].url, servers[1].url, tokenizer)


@pytest.fixture(scope="module")
def life_of(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Life]:
    """The life of an environment, which it lives only once."""
    known: dict[str, Life] = {}

    def life_of(style: str) -> Life:
        if style not in known:
            known[style] = world.live(STYLES[style], tmp_path_factory.mktemp(style))
        return known[style]

    return life_of


LifeOf = Callable[[str], Life]


def text(token_ids: list[int]) -> str:
    decoded: str = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    return decoded.strip()


def check_row(style: str, row: Row) -> None:
    """What is trained is what was replied; what is paid is what it deserves."""
    assert len(row.tokens) == len(row.masks)
    assert all(mask in (-100, token) for token, mask in zip(row.tokens, row.masks, strict=True))
    if style == "managed_game":
        assert text(row.trained) in ("57", "557", "555")
        assert (row.score > 0) == (text(row.trained)[-1] == "7")
        return
    left, right = SUM.findall(text(row.prompt))[-1]
    assert (row.score > 0) == (text(row.trained) == str(int(left) + int(right)))


def check_logprobs(style: str, row: Row, *, unsampled: float) -> None:
    """Those of the engine where it sampled: -0.25, -0.5, ... for every reply anew."""
    if style not in WITH_LOGPROBS:
        assert row.logprobs is None
        return
    assert row.logprobs is not None
    assert len(row.logprobs) == len(row.tokens)
    for logprob, mask in zip(row.logprobs, row.masks, strict=True):
        assert logprob == unsampled if mask == -100 else logprob in (-0.25, -0.5, -0.75, -1.0, -1.25)
    assert row.logprobs[len(row.prompt)] == -0.25


@every_style
def test_every_mode_ends_well(life_of: LifeOf, style: str) -> None:
    life = life_of(style)

    for name, status in life.statuses.items():
        assert status == 0, f"{name}:\n{life.logs[name][-4000:]}"
        assert "Traceback" not in life.logs[name], life.logs[name][-4000:]


@every_style
def test_a_trainer_of_today_gets_what_was_scored(life_of: LifeOf, style: str) -> None:
    life = life_of(style)

    rows = [row for group in life.groups for row in rows_of_columns(group)]
    assert len(rows) == STEPS * STYLES[style].batch_size
    assert len({group.group_id for group in life.groups}) == len(life.groups)
    for row in rows:
        check_row(style, row)
        check_logprobs(style, row, unsampled=0.0)
    for group in life.groups:
        assert group.version_range == (0, 0)
        assert (len(set(group.scores.tolist())) > 1) is (style != "sft_rows")


@every_style
def test_an_old_trainer_gets_the_same_in_its_own_form(life_of: LifeOf, style: str) -> None:
    life = life_of(style)

    assert life.old_batch_sizes[:STEPS] == [STYLES[style].batch_size] * STEPS, life.logs["old"][-4000:]
    for group in life.old_groups:
        assert set(group) >= GROUP_KEYS
        for row in rows_of_json(group):
            check_row(style, row)
            check_logprobs(style, row, unsampled=1.0)


@every_style
def test_process_writes_groups_and_a_page(life_of: LifeOf, style: str) -> None:
    life = life_of(style)

    assert len(life.lines) == GROUPS_TO_PROCESS
    for group in life.lines:
        assert {"ref_logprobs", "overrides", "group_overrides", "distill_token_ids", "distill_logprobs"} <= set(group)
        assert len(group["messages"]) == len(group["tokens"]), "include_messages is on"
        for row in rows_of_json(group):
            check_row(style, row)
    page = (life.folder / "process" / "groups.html").read_text()
    assert page.count("reward-positive") >= GROUPS_TO_PROCESS


@every_style
def test_evaluate_writes_the_metrics(life_of: LifeOf, style: str) -> None:
    life = life_of(style)

    if style == "sft_rows":
        assert life.metrics("evaluate") is None
        return
    metrics = life.metrics("evaluate")
    assert metrics is not None, life.logs["evaluate"]
    assert EVALUATIONS[style] in (None, metrics)
    config = (life.folder / "evaluate" / "evals" / "evaluate_config.yaml").read_text()
    assert "group_size: 4" in config


@pytest.mark.parametrize("style", [name for name in STYLES if name != "sft_rows"])
def test_serve_evaluates_at_the_steps(life_of: LifeOf, style: str) -> None:
    life = life_of(style)

    for name in ("native", "old"):
        assert life.metrics(name) is not None, life.logs[name]


# What one style alone has


def test_checkpoints_hold_what_the_environment_puts_there(life_of: LifeOf) -> None:
    states = sorted(life_of("chat_group").folder.glob("checkpoints/env_checkpoints/*/step-*.json"))

    assert states
    assert json.loads(states[-1].read_text())["iter"] >= STEPS * 2


def test_overrides_of_every_sequence_arrive(life_of: LifeOf) -> None:
    one, several, texts = life_of("one_trajectory"), life_of("several_groups"), life_of("text_completion")

    assert all(group.overrides == [{"set_advantage_to_zero": False}] * 4 for group in one.groups)
    for group in several.groups:
        assert group.overrides == [{"set_advantage_to_zero": score == 0.0} for score in group.scores.tolist()]
    for old in texts.old_groups:
        assert old["overrides"] == [{"temperature": 0.5 + i} for i in range(4)]
        assert old["group_overrides"] is None


def test_generation_params_arrive_and_unknown_keys_do_not(life_of: LifeOf) -> None:
    life = life_of("managed_group")

    assert all(group.generation_params == {"temperature": 0.7} for group in life.groups)
    assert all(group["generation_params"] == {"temperature": 0.7} for group in life.old_groups)
    assert not any("ground_truths" in group for group in life.old_groups)
    assert all(set(line["ground_truths"]) for line in life.lines), "the file holds the group as it was made"


def test_every_turn_of_a_game_is_trained_with_no_token_twice(life_of: LifeOf) -> None:
    for group in life_of("managed_game").groups:
        for row in rows_of_columns(group):
            whole = TOKENIZER.decode(row.tokens)
            assert "<|im_end|><|im_end|>" not in whole
            assert whole.count("<|im_start|>assistant") == len(text(row.trained))
            assert TOKENIZER.decode(row.trained).count("<|im_end|>") == len(text(row.trained))
        assert group.messages[0][0]["content"].startswith("Guess a number")


def test_a_stage_out_of_the_backlog_makes_the_group(life_of: LifeOf) -> None:
    for group in life_of("stages").groups:
        for row in rows_of_columns(group):
            assert SUM.findall(text(row.prompt))[-1][1] == "3", "the second number of the draft"


def test_groups_have_the_sizes_that_they_say(life_of: LifeOf) -> None:
    life = life_of("mixed_sizes")

    for group in life.groups:
        overrides = group.group_overrides or {}
        assert overrides["group_size"] == group.n_sequences
        assert overrides["task_id"].startswith("task-")
    assert {2, 6} & {group.n_sequences for group in life.groups}
    assert all(len(group["tokens"]) == group["group_overrides"]["group_size"] for group in life.old_groups)


def test_rows_of_a_data_set_are_sent_though_they_are_few_and_alike(life_of: LifeOf) -> None:
    life = life_of("sft_rows")

    for group in life.groups:
        assert group.n_sequences == 2
        assert group.overrides == [{"sft": True}] * 2
        assert group.advantages is not None
        assert set(group.advantages.tolist()) == {1.0}
    for old in life.old_groups:
        assert old["group_overrides"] == {"sft": True}
        assert [len(row) for row in old["advantages"]] == [len(row) for row in old["tokens"]]


def test_advantages_of_every_token_arrive(life_of: LifeOf) -> None:
    life = life_of("token_advantages")

    for group in life.groups:
        assert group.advantages is not None
        assert group.ref_logprobs is not None
        by_token = np.repeat(group.scores - 0.5, np.diff(group.cu_seqlens))
        assert group.advantages.tolist() == np.where(group.loss_mask, by_token, 0.0).tolist()
        assert set(group.ref_logprobs.tolist()) == {-0.125}
    for old in life.old_groups:
        assert [len(row) for row in old["advantages"]] == [len(row) for row in old["tokens"]]


def test_the_teachers_candidates_arrive(life_of: LifeOf) -> None:
    life = life_of("distillation")

    for group in life.groups:
        assert group.distill_token_ids is not None
        assert group.distill_logprobs is not None
        assert group.distill_token_ids.shape == group.distill_logprobs.shape
        assert group.distill_token_ids.shape[0] == group.n_tokens
    for old in life.old_groups:
        assert [len(row) for row in old["distill_token_ids"]] == [len(row) for row in old["tokens"]]
        assert all(
            token in candidates
            for token, candidates in zip(old["tokens"][0][1:], old["distill_token_ids"][0][1:], strict=True)
        )


def test_postprocessing_picks_among_the_groups_of_an_item(life_of: LifeOf) -> None:
    life = life_of("several_groups")

    assert {(group.group_overrides or {})["turn"] for group in life.groups} <= {1, 3}
    assert [line["group_overrides"]["turn"] for line in life.lines] == [1, 3, 1]


def test_pictures_pass_through(life_of: LifeOf) -> None:
    life = life_of("pictures")

    for image in [*(group.images[0] for group in life.groups), *(group["images"][0] for group in life.old_groups)]:
        assert image.startswith("iVBORw0KGgo")
    for group in life.groups:
        assert [part["type"] for part in group.messages[0][0]["content"]] == ["text", "image_url"]


def test_tables_of_the_environments_own_are_logged(life_of: LifeOf) -> None:
    life = life_of("wandb_tables")
    tables = list((life.folder / "native").glob("wandb/offline-run-*/files/media/table/**/*.table.json"))

    shown: list[Any] = [json.loads(path.read_text()) for path in tables]
    assert shown, life.logs["native"]
    for table in shown:
        assert table["columns"] == ["text", "score", "expected_answer"]
        for sample, score, expected in table["data"]:
            assert f"{expected}<|im_end|>" in sample or score == -1.0
