"""`python -m environments.teaching`: two addresses, its own problems, and what every environment keeps to."""

from __future__ import annotations

import json
import re
import runpy
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib.envs.base import APIServerConfig, BaseEnv
from atroposlib.envs.server_pools import build_env
from atroposlib.testing import check_env
from atroposlib.testing.mock.policies import Prompt, PromptFunction
from atroposlib.testing.mock_inference import MockInferenceServer, in_thread
from environments.teaching import TeachingEnv
from environments.teaching.env import SAMPLE
from tests.environments.running import Stand, lines_of
from tests.processes import RolloutServerProcess

ROWS = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
ANSWERS = {row["prompt"]: row["ground_truth"] for row in ROWS}
HINT = "Take it slowly."
# In bytes prompts are several times as long as in words.
IN_BYTES = {"max_token_length": 2048, "max_prompt_length": 1024, "max_guidance_tokens": 32}


def solve(prompt: Prompt) -> str:
    """The student's part: right with HINT, wrong otherwise."""
    question, _, rest = prompt.last_user_text.partition("\n")
    return ANSWERS[question] if HINT in rest else "no idea"


def hint(prompt: Prompt) -> str:
    """The policy's part: every other guidance is of use."""
    return "Hm." if prompt.index % 2 else HINT


class TeachingStand(Stand):
    """With a second server for the student."""

    async def env(self, stack: AsyncExitStack, **settings: Any) -> BaseEnv:
        self.mock = await stack.enter_async_context(MockInferenceServer(self.policy))
        self.student = await stack.enter_async_context(MockInferenceServer(PromptFunction(solve)))
        config, _ = self.env_cls.config_init()
        config = type(config).model_validate({**config.model_dump(), **self.settings, **settings})
        policy_at = [APIServerConfig(base_url=self.mock.url, server_type="vllm")]
        env = build_env(self.env_cls, config, policy_at, {"student": [APIServerConfig(base_url=self.student.url)]})
        stack.push_async_callback(env.aclose)
        return env


@pytest.fixture
def stand(bytes_tokenizer: str) -> TeachingStand:
    return TeachingStand(TeachingEnv, PromptFunction(hint), bytes_tokenizer, group_size=2, **IN_BYTES)


async def test_process_writes_groups_that_are_paid_for_help(stand: TeachingStand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    for group in groups:
        assert group["scores"][0] > 1 > group["scores"][1] == 0
        assert group["messages"][0][-1]["content"] == HINT
        assert ANSWERS[group["group_overrides"]["teaching"]["question"]]


async def test_serve_sends_exact_tokens_to_the_trainer(
    stand: TeachingStand, rollout_server: RolloutServerProcess, tmp_path: Path
) -> None:
    batch = await stand.leased(rollout_server, tmp_path / "run")

    for group in batch:
        assert group.inference_logprobs is not None
        assert (group.inference_logprobs[group.loss_mask.astype(bool)] <= 0).all()
        assert group.finish_reasons == ("stop", "stop")
        assert group.group_overrides is not None
        assert group.group_overrides["teaching"]["baseline_score"] == 0.0
    assert (tmp_path / "run" / "baselines.sqlite").exists()


async def test_evaluate_tells_what_teaching_changes(stand: TeachingStand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert (metrics["baseline_accuracy"], metrics["student_accuracy"], metrics["accuracy_delta"]) == (0.0, 1.0, 1.0)
    assert 40 < metrics["heldout_size"] == len(samples) < 120
    assert {sample["teaching"] for sample in samples} == {HINT}


async def test_check_env_finds_nothing(bytes_tokenizer: str) -> None:
    def either(prompt: Prompt) -> str:
        return hint(prompt) if "A student says" in prompt.last_user_text else solve(prompt)

    report = await check_env(
        TeachingEnv, reply=PromptFunction(either), n_items=2, stages_outage=False, config={"group_size": 2, **IN_BYTES}
    )

    report.raise_for_errors()
    assert [finding.check for finding in report.warnings] == []


def test_the_command_line_gives_each_role_its_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--openai.base_url", "http://a/v1", "--student.base_url", "http://b/v1", "--student.model_name", "frozen"]
    monkeypatch.setattr(
        sys, "argv", ["teaching", "serve", "--dry-run", "--data", '{"dataset_path": "x.jsonl"}', *flags]
    )

    runpy.run_module("environments.teaching", run_name="__main__")

    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["openai"][0]["base_url"] == "http://a/v1"
    assert (shown["student"][0]["base_url"], shown["student"][0]["model_name"]) == ("http://b/v1", "frozen")
    assert shown["env"]["data"]["dataset_path"] == "x.jsonl"


def test_a_whole_process_run_from_the_command_line(
    bytes_tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "groups.jsonl"
    with (
        in_thread(MockInferenceServer(PromptFunction(hint))) as policy,
        in_thread(MockInferenceServer(PromptFunction(solve))) as student,
    ):
        flags = {
            "total_steps": 1, "group_size": 2, "tokenizer_name": bytes_tokenizer, "use_wandb": False,
            "openai.base_url": policy.url, "student.base_url": student.url, "data_path_to_save_groups": path,
            "max_num_workers": 1, **IN_BYTES,
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["teaching", "process", *words])
        runpy.run_module("environments.teaching", run_name="__main__")

    [group] = lines_of(path)
    assert group["scores"][0] > group["scores"][1]


def test_its_problems_are_right() -> None:
    assert len(ROWS) == len(ANSWERS) == 400
    for question, answer in ANSWERS.items():
        left, right = (int(number) for number in re.findall(r"\d+", question))
        is_loss, is_product = (any(word in question for word in words) for words in ((" left",), ("bags", "rows")))
        assert int(answer) == (left - right if is_loss else left * right if is_product else left + right), question
