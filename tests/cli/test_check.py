"""atropos check: exit status, report for people, report for scripts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from atroposlib.cli.main import main

RIGHT = """
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig

class Four(BaseEnv):
    name = "four"

    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=8), [APIServerConfig(base_url="http://localhost:1/v1", server_type="vllm")]

    async def get_next_item(self):
        return 4

    async def collect_trajectories(self, item):
        messages = [{"role": "user", "content": "2+2"}]
        return await self.rollout_group(messages, reward=lambda text: float(text == "4"), max_tokens=4), []

    async def evaluate(self):
        print("evaluating")
        await self.evaluate_log({"heldout_reward": 1.0})
"""
WRONG = RIGHT.replace("float(text == ", "float('nan' or ")
BARE = RIGHT[: RIGHT.index("    async def evaluate")]
REPLIES = ("--one-of", "4", "--one-of", "5")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("atroposlib")
    level = logger.level
    yield
    logger.setLevel(level)


def run(tmp_path: Path, code: str, *flags: str) -> int:
    file = tmp_path / "an_env.py"
    file.write_text(code)
    return main(["check", str(file), *flags])


def test_a_right_environment_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, RIGHT, *REPLIES, "--strict") == 0

    output = capsys.readouterr()
    assert "four works" in output.out
    assert "4 items, 4 groups, 32 sequences" in output.out
    assert "evaluating" in output.err


def test_an_error_exits_with_1_and_shows_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, WRONG, *REPLIES) == 1

    output = capsys.readouterr().out
    assert "four fails" in output
    assert "not a finite number" in output
    assert "fix: return a float from the reward" in output


def test_warnings_count_only_when_strict(tmp_path: Path) -> None:
    assert run(tmp_path, BARE, *REPLIES) == 0
    assert run(tmp_path, BARE, *REPLIES, "--strict") == 1


def test_json_is_all_that_is_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, RIGHT, *REPLIES, "--json", "--items", "2", "--set", "group_size=3") == 0

    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["findings"] == []
    assert (report["groups"], report["sequences"]) == (2, 6)


def test_nothing_to_check_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "nowhere.py")]) == 2
    assert "no file" in capsys.readouterr().err
    assert run(tmp_path, RIGHT, "--set", "group_size") == 2
    assert "KEY=VALUE" in capsys.readouterr().err
