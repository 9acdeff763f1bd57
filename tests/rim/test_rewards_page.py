"""docs/rewards.md says what the code does, and its programs run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from atroposlib.rim import RIMReward
from atroposlib.rim.config import ALL_JUDGES, PRESETS
from atroposlib.rim.endpoints import PROVIDERS
from atroposlib.testing.byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer
from tests.rim.judges import SHOWN, Asked, ScriptedJudge, a_trajectory, verdict

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"```py\n# (\w+)\.py\n(.*?)```", PAGE, flags=re.S))


async def run(*command: str, **environ: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_first_score_prints_what_the_page_says(tmp_path: Path) -> None:
    [reply] = re.findall(r"mock-inference --port 9003 --text '(.*?)'\n", PAGE)
    file = tmp_path / "first_score.py"

    async with MockInferenceServer(reply) as judge:
        file.write_text(PROGRAMS["first_score"].replace("http://localhost:9003/v1", judge.url))
        printed = await run(str(file))

    assert printed.splitlines() == ["0.8 {'accuracy': 0.8, 'process': 0.8}", "Right, but without its unit."]
    assert all(f"`{line}`" in PAGE for line in printed.splitlines())


async def test_the_environment_pays_what_the_judge_says(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (tmp_path / "judged.py").write_text(PROGRAMS["judged"])
    replies = ["Air scatters blue light.", "Because."]

    def by_reply(asked: Asked) -> Any:
        return verdict(0.9 if "scatters blue" in asked.prompt else 0.2)

    async with (
        MockInferenceServer(lambda prompt, index: tokenizer.encode(f"{replies[index % 2]}<|im_end|>")) as policy,
        ScriptedJudge(by_reply) as judge,
    ):
        await run(
            str(tmp_path / "judged.py"), "process", "--total_steps", "1", "--group_size", "2",
            "--tokenizer_name", save_byte_tokenizer(tmp_path / "tokenizer"),
            "--data_path_to_save_groups", str(tmp_path / "groups.jsonl"),
            "--openai.base_url", policy.url, "--openai.model_name", "mock", "--openai.server_type", "vllm",
            JUDGE_MODEL=f"{judge.url}#small",
        )  # fmt: skip

    [group] = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert group["scores"] == [0.9, 0.2]


def table(header: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(f"\n| {header} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


async def test_every_metric_is_explained_and_every_explained_metric_exists() -> None:
    free = {"prompt_price": 0, "completion_price": 0}
    async with (
        ScriptedJudge(lambda asked: verdict(0.8)) as judge,
        RIMReward(judge.config(model_configs={"default": free, "large": free})) as rim,
    ):
        await rim.score([a_trajectory()])
        made = {*rim.take_metrics(), *rim.take_explanations()}
    explained = {name for row in table("metric") for name in re.findall(r"`([^`]+)`", row[0])}

    assert {re.sub(r"(rim_\w+)/.*", r"\1/<judge>", name) for name in made} == explained


def test_the_judges_of_the_page_read_what_it_says() -> None:
    documented = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in table("judge")}

    assert documented == {name: SHOWN[name] for name in ALL_JUDGES}


@pytest.mark.parametrize("name", [*PRESETS, *PROVIDERS])
def test_presets_and_services_are_named(name: str) -> None:
    assert f"`{name}`" in PAGE
