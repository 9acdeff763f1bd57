"""What a viewer sees: the live view in a wide and a narrow terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from atroposlib.launch.events import EventLog
from atroposlib.launch.processes import Child, ProcessSpec
from atroposlib.launch.run_folder import RunFolder
from atroposlib.launch.telemetry import Telemetry
from atroposlib.launch.view import PlainView, duration, render, sparkline
from atroposlib.wire.models import Status


@pytest.fixture
def telemetry(tmp_path: Path) -> Telemetry:
    folder = RunFolder.create(tmp_path, "run")
    child = Child(ProcessSpec("trainer", ("true",)), folder.logs / "trainer.log", EventLog(folder.events))
    child.state = "running"
    telemetry = Telemetry(folder, num_steps=10, children={"trainer": child})
    telemetry.phase = "training"
    return telemetry


def write_steps(telemetry: Telemetry, *rewards: float) -> None:
    now = time.time()
    with telemetry.folder.metrics.open("a") as file:
        for step, reward in enumerate(rewards):
            line = {"step": step, "time": now + step, "reward/mean": reward, "staleness/max": 1.0}
            file.write(json.dumps(line) + "\n")
    telemetry.read_files()


def shown(telemetry: Telemetry, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(telemetry, width=width))
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_shows_progress_reward_and_what_a_process_waits_for(telemetry: Telemetry, width: int) -> None:
    write_steps(telemetry, 0.1, 0.2, 0.6)
    telemetry.status = Status(trainer_waits_for="a batch of 64", policy_version=3)

    text = shown(telemetry, width)

    for words in ("step 3/10", "ETA", "0.600", "policy version", "a batch of 64", "trainer", "0.10 to 0.60"):
        assert words in text


def test_the_time_that_a_run_lay_still_says_nothing_about_its_pace(telemetry: Telemetry) -> None:
    now = time.time()
    telemetry.steps = [{"step": i, "time": now + seconds} for i, seconds in enumerate((-3602, -3601, -2, -1, 0))]

    assert telemetry.eta_s == pytest.approx(5, abs=1)


def test_the_view_stands_before_anything_is_known(telemetry: Telemetry) -> None:
    assert "step 0/10" in shown(telemetry, 100)


def test_a_resumed_trainer_takes_the_curve_back(telemetry: Telemetry) -> None:
    write_steps(telemetry, 0.1, 0.2, 0.3)
    write_steps(telemetry, 0.1, 0.9)

    assert telemetry.series("reward/mean") == [0.1, 0.9]


def test_the_sampling_rate_is_taken_over_bursts(telemetry: Telemetry) -> None:
    with telemetry.folder.env_metrics.open("a") as file:
        for at, tokens in ((0.0, 0), (2.0, 200), (4.0, 200), (6.0, 200), (10.0, 500)):
            file.write(json.dumps({"time": at, "env": "a", "env/sampled_tokens": tokens}) + "\n")
    telemetry.read_files()

    assert telemetry.sampling_tokens_per_s == 50.0


def test_plain_lines_come_once_each(telemetry: Telemetry) -> None:
    console = Console(record=True, width=200, quiet=False)
    view = PlainView(telemetry, console)
    telemetry.on_event({"time": 0.0, "event": "died", "text": "trainer was killed"})
    write_steps(telemetry, 0.5)

    view.update()
    view.update()

    text = console.export_text()
    assert text.count("trainer was killed") == 1
    assert text.count("step 1/10  reward 0.500") == 1


def test_sparklines_span_lowest_to_highest() -> None:
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([3.0, 3.0], 10) == "▅▅"
    assert sparkline([], 10) == ""
    assert sparkline([9.0, 0.0, 1.0], 2) == "▁█"


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (185, "3:05 min"), (3723, "1:02:03 h")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
