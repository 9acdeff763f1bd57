"""Alarms and curves of the trainer in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atroposlib.launch.alarm_periods import AlarmPeriod, alarm_periods
from atroposlib.launch.report import write_report
from atroposlib.launch.report_figure import PANELS, Run, draw_figure
from atroposlib.launch.run_folder import RunFolder
from atroposlib.launch.summary import summarise

pytest.importorskip("matplotlib")


def test_a_period_is_from_start_to_end() -> None:
    steps: list[dict[str, Any]] = [
        {"step": 0},
        {"step": 1, "alarm/ess_low": 1.0},
        {"step": 2},
        {"step": 3, "alarm/ess_low": 0.0},
        {"step": 4},
    ]
    told = [
        {"step": 1, "alarm": "ess_low", "is_on": True, "text": "from a run that was taken back"},
        {"step": 1, "alarm": "ess_low", "is_on": True, "text": "ess is 0.4"},
        {"step": 3, "alarm": "ess_low", "is_on": False, "text": "over"},
    ]

    assert alarm_periods(steps, told) == [AlarmPeriod("ess_low", 1, 3, "ess is 0.4")]


def test_an_alarm_that_is_on_at_the_end_has_no_end() -> None:
    assert alarm_periods([{"step": 5, "alarm/truncated": 1.0}, {"step": 6}], []) == [
        AlarmPeriod("truncated", 5, None, "")
    ]


def test_an_end_without_a_start_is_no_period() -> None:
    assert alarm_periods([{"step": 5, "alarm/truncated": 0.0}], []) == []


def test_the_page_tells_each_alarm_with_its_text(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    steps = [{"step": i, "time": i, "alarm/ess_low": 1.0} if i == 2 else {"step": i, "time": i} for i in range(5)]
    folder.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))
    line = {"step": 2, "alarm": "ess_low", "is_on": True, "text": "ess is 0.4 & falling"}
    (folder.path / "alarms.jsonl").write_text(json.dumps(line) + "\n")

    page = write_report(folder, summarise(folder)).read_text()

    assert "ess_low<td class=right>2 to end<td>ess is 0.4 &amp; falling" in page


def test_every_chart_is_drawn_from_figures_and_without_any(tmp_path: Path) -> None:
    summary = summarise(RunFolder.create(tmp_path, "run"))
    figures = {
        "loss/total": 0.1, "loss/kl": 0.2, "entropy": 1.0, "grad_norm": 0.5, "tokens/step": 100.0, "reward/mean": 0.5,
        "time/step_s": 2.0, "time/train_s": 1.0, "completion/mean": 5.0, "staleness/max": 1.0, "staleness/mean": 1.0,
        "mismatch/kl_k3": 0.01, "ess": 0.9,
    }  # fmt: skip
    steps = [{"step": i, **figures} for i in range(4)]

    full = draw_figure(Run(summary, steps, [AlarmPeriod("ess_low", 1, None, "")])).axes
    empty = draw_figure(Run(summary, [])).axes

    drawn = {axes.get_title("left") for axes in full if axes.has_data()}
    assert {panel.title for panel in PANELS} - drawn == {"Held-out reward"}
    assert [axes for axes in empty if axes.has_data()] == []
    (speed,) = (axes for axes in full if axes.get_title("left") == "Trained tokens")
    assert [np.asarray(line.get_ydata())[0] for line in speed.lines] == [50.0, 100.0]
