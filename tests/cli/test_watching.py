"""atropos doctor and atropos view against a real rollout server, and what their pictures say."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from atroposlib.cli.main import main
from atroposlib.cli.view_screen import Look, render
from atroposlib.client import RolloutClient
from atroposlib.wire.models import (
    EnvRequest,
    EnvStatus,
    Event,
    Finding,
    InferenceServer,
    InferenceServerStatus,
    Status,
)
from tests.builders import a_run
from tests.processes import RolloutServerProcess, free_port


async def join(url: str) -> None:
    async with RolloutClient(url, deadline_s=5) as client:
        run = await client.open_run(a_run("demo", batch_size=8, num_steps=20))
        await client.register_env(EnvRequest(name="arithmetic", group_size=2))
        await client.publish_policy(0, session=run.session)


def shown(look: Look, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(look, source="http://host:8000", width=width))
    return console.export_text()


def test_doctor_ends_with_1_and_the_fix_when_something_is_broken(
    rollout_server: RolloutServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", rollout_server.url]) == 1

    text = " ".join(capsys.readouterr().out.split())
    assert "error trainer: no run is open" in text
    assert "fix: start atropos-trainer" in text


def test_doctor_ends_with_0_when_nothing_is(
    rollout_server: RolloutServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(join(rollout_server.url))

    assert main(["doctor", rollout_server.url]) == 0
    assert "healthy  run demo, step 0/20" in capsys.readouterr().out


def test_doctor_speaks_json_to_scripts(
    rollout_server: RolloutServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", rollout_server.url, "--json"]) == 1

    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["severity"], finding["subject"]) == ("error", "trainer")


@pytest.mark.parametrize("command", [["doctor"], ["view", "--once"]])
def test_a_server_that_is_not_there_is_one_line_and_status_2(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atroposlib.cli.connection.DEADLINE_S", 0.3)
    url = f"http://127.0.0.1:{free_port()}"

    assert main([command[0], url, *command[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"error: rollout server {url} did not answer")


def test_one_look_shows_the_run_and_changes_nothing(
    rollout_server: RolloutServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(join(rollout_server.url))
    before = asyncio.run(status_of(rollout_server.url))

    assert main(["view", rollout_server.url.removeprefix("http://"), "--once"]) == 0

    text = capsys.readouterr().out
    for words in ("step 0/20", "arithmetic", "policy version", "batch size", "environment arithmetic: id 0"):
        assert words in text
    after = asyncio.run(status_of(rollout_server.url))
    assert (after.run_id, after.envs[0].groups_accepted) == (before.run_id, 0)


async def status_of(url: str) -> Status:
    async with RolloutClient(url, deadline_s=5) as client:
        return await client.status()


def test_a_target_that_is_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path / "nothing")]) == 2
    assert "neither a URL" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 140])
def test_the_picture_names_everybody_and_who_waits_for_whom(width: int) -> None:
    env = EnvStatus(
        env_id=0, name="arithmetic", group_size=8, max_token_len=64, weight=1.0, min_batch_allocation=None,
        is_connected=True, last_seen_s=500.0, tickets=3, queued_groups=2, queued_sequences=16, groups_accepted=41,
        trained_tokens=900,
    )  # fmt: skip
    status = Status(
        run_name="demo", run_id="r", batch_size=64, max_staleness=2, step=7, num_steps=20, policy_version=7, queued_groups=2,
        queued_bytes=2_500_000, admitted_sequences=640, capacity_sequences=640, groups_retired={"late": 4, "stale": 0},
        tickets_returned={"zero_variance": 9}, trainer_waits_for="48 more sequences for step 7", envs=[env],
        inference_servers=[
            InferenceServerStatus(server=InferenceServer(url="http://gpu:9001", policy_version=6), last_seen_s=1)
        ],
    )  # fmt: skip
    look = Look(
        status,
        findings=[Finding(severity="warning", subject="queue", problem="nearly full", fix="wait")] * 5,
        events=[Event(id=1, time_s=0.0, kind="batch_formed", text="batch of step 6: 8 groups")],
        steps_per_s=0.1,
    )

    text = shown(look, width)

    for words in (
        "step 7/20", "6.0 steps/min", "ETA 2:10 min", "the trainer waits for 48 more sequences", "arithmetic", "silent",
        "the environments wait for the trainer", "http://gpu:9001", "2.5 MB", "4 late", "9 zero_variance",
        "warning: queue: nearly full", "1 more: atropos doctor", "batch of step 6: 8 groups",
    ):  # fmt: skip
        assert words in text, words
    assert "0 stale" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_the_picture_stands_before_anything_is_known() -> None:
    assert "nothing is known of a trainer" in shown(Look(Status()), 80)


def test_the_picture_says_that_it_is_old_when_the_server_is_gone() -> None:
    assert "seen 9 s ago" in shown(Look(Status(), problem="this is what was seen 9 s ago: gone"), 100)
