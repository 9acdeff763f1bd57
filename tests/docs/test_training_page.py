"""docs/training.md says what the code does: metrics, alarms, options and their values."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.trainer.fakes import FakeRolloutServer, a_config, tiny_llama
from trainer.config.checks import ONE_OF
from trainer.grpo_trainer import GRPOTrainer
from trainer.methods import METHODS
from trainer.reporting.alarms import alarm_rules

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
NO_FIGURES = {"step", "time", "policy_version"}


def table(header: str) -> list[list[str]]:
    """Rows of the table whose header line begins so."""
    lines = PAGE[PAGE.index(f"\n| {header} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def documented_metrics() -> set[str]:
    return {name for row in table("metric") for name in re.findall(r"`([^`]+)`", row[0])}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The figures that a run writes."""
    folder = tmp_path_factory.mktemp("run")
    server = FakeRolloutServer()
    config = a_config(folder, max_steps=2)
    GRPOTrainer(config, model=tiny_llama(), connect=server.client).train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name for line in lines for name in line} - NO_FIGURES


def test_every_metric_of_a_run_is_explained(written: set[str]) -> None:
    alarms = {name for name in written if name.startswith("alarm/")}

    assert written - alarms <= documented_metrics()


def test_every_explained_metric_exists(written: set[str]) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trainer").rglob("*.py"))
    invented = {name for name in documented_metrics() - written if f'"{name}"' not in sources}

    assert invented == set()


def test_the_alarms_are_those_of_the_code() -> None:
    documented = {row[0].strip("`"): (float(row[1]), float(row[2])) for row in table("alarm")}

    assert documented == {rule.name: (rule.starts_at, rule.ends_at) for rule in alarm_rules(max_staleness=4)}


@pytest.mark.parametrize("option", ["loss_type", "correction", "advantage_scale", "loss_aggregation"])
def test_the_values_of_an_option_are_all_there(option: str) -> None:
    assert sorted(row[0].strip("`") for row in table(f"`{option}`")) == sorted(ONE_OF[option])


def named_options() -> list[tuple[str, str]]:
    """Every key=value in code on the page."""
    code = " ".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)) + " ".join(re.findall(r"`([^`\n]+)`", PAGE))
    found = re.findall(r"(?<![\w.-])([a-z_]+(?:\.[a-z_]+)?)=([\w./-]+)", code)
    return [(key, value) for key, value in found if key != "key"]


def test_every_option_on_the_page_exists_and_takes_the_value() -> None:
    schema = METHODS["grpo"].schema
    nested = {f"{group}.{name}" for group, names in schema.named_groups.items() for name in names}
    keys = {*schema.keys, *nested, "recipe"}
    wrong = [
        f"{key}={value}"
        for key, value in named_options()
        if key not in keys or (key in ONE_OF and value not in ONE_OF[key])
    ]

    assert len(named_options()) > 30
    assert wrong == []
