"""`python env.py process` as a process: Ctrl-C and SIGKILL, then --resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = """
import asyncio, itertools
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig

class Config(BaseEnvConfig):
    tokenizer_name: str | None = None
    slow_from: int = 1000

class Slow(BaseEnv):
    name = "slow"
    env_config_cls = Config

    @classmethod
    def config_init(cls):
        return Config(group_size=2, max_num_workers=2), [APIServerConfig(base_url="http://127.0.0.1:1/v1")]

    async def setup(self):
        self.items = itertools.count()

    async def get_next_item(self):
        return next(self.items)

    async def collect_trajectories(self, item):
        await asyncio.sleep(60 if item >= self.config.slow_from else 0)
        return {"tokens": [[1, 2]] * 2, "masks": [[-100, 2]] * 2, "scores": [item, 0],
                "messages": [[{"role": "user", "content": str(item)}]] * 2}, []

if __name__ == "__main__":
    Slow.cli()
"""


def command(folder: Path, *options: str) -> list[str]:
    script = folder / "slow.py"
    script.write_text(ENVIRONMENT)
    path = str(folder / "groups.jsonl")
    return [sys.executable, str(script), "process", "--total_steps", "6", "--data_path_to_save_groups", path, *options]


def interrupted(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Status and stderr of a run that is interrupted when three groups are written."""
    file = folder / "groups.jsonl"
    with subprocess.Popen(
        command(folder, "--slow_from", "3"), stderr=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        while not file.exists() or file.read_text().count("\n") < 3:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=15)
    return process.returncode, stderr


def resumed(folder: Path) -> str:
    done = subprocess.run(
        command(folder, "--resume"), capture_output=True, text=True, timeout=30, cwd=folder, check=True
    )
    return done.stdout


def scores(folder: Path) -> list[int]:
    return [json.loads(line)["scores"][0] for line in (folder / "groups.jsonl").read_text().splitlines()]


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(tmp_path: Path) -> None:
    status, stderr = interrupted(tmp_path, signal.SIGINT)

    assert status == 130
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert "3 groups after 3 before" in resumed(tmp_path)
    assert scores(tmp_path) == list(range(6))


def test_a_killed_process_goes_on_too(tmp_path: Path) -> None:
    interrupted(tmp_path, signal.SIGKILL)

    resumed(tmp_path)

    assert scores(tmp_path) == list(range(6))
    assert (tmp_path / "groups.html").read_text().count('<details class="group">') == 6
