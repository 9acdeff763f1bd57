"""The report: one page that needs nothing else, for a whole run and for one with holes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from atroposlib.launch.report import write_report
from atroposlib.launch.run_folder import RunFolder
from atroposlib.launch.summary import summarise

pytest.importorskip("matplotlib")


def lines(*items: Mapping[str, object]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def test_the_page_holds_curves_samples_events_and_config(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    folder.config.write_text("name: run\n")
    steps = [{"step": i, "time": i, "reward/mean": i / 9, "staleness/max": 1, "mismatch/kl_k3": 0.1} for i in range(9)]
    folder.metrics.write_text(lines(*steps))
    rollouts = [
        {"step": i, "version": i, "prompt": f"p{i}", "completion": f"<b>c{i}</b>", "reward": i} for i in range(40)
    ]
    folder.rollouts.write_text(lines(*rollouts))
    folder.events.write_text(lines({"time": 1.0, "event": "died", "text": "trainer was killed", "process": "trainer"}))

    page = write_report(folder, summarise(folder, max_staleness_allowed=2)).read_text()

    assert (folder.path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/svg+xml;base64," in page
    assert "&lt;b&gt;c0&lt;/b&gt;" in page  # text of a model is text, not markup
    assert "&lt;b&gt;c39&lt;/b&gt;" in page
    assert "trainer was killed" in page
    assert "name: run" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere


def test_a_run_without_a_single_step_has_a_report(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")

    page = write_report(folder, summarise(folder, outcome="ended by SIGINT")).read_text()

    assert "ended by SIGINT" in page
    assert "No sample rollouts" in page
