"""utils.cli, utils.metrics and utils.display, as environments with a command line of their own use them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field

from atroposlib.utils.cli import (
    adjust_model_defaults,
    extract_namespace,
    get_double_dash_flags,
    get_prefixed_pydantic_model,
    merge_dicts,
)
from atroposlib.utils.display import display_metrics_table
from atroposlib.utils.metrics import get_std_min_max_avg


class Settings(BaseModel):
    size: int = Field(default=4, ge=1, description="How many.")
    names: list[str] = Field(default_factory=lambda: ["a"])
    needed: str


def test_a_prefixed_model_keeps_type_default_and_description() -> None:
    fields = get_prefixed_pydantic_model(Settings, "env.").model_fields

    assert list(fields) == ["env.size", "env.names", "env.needed"]
    assert (fields["env.size"].annotation, fields["env.size"].default) == (int, 4)
    assert fields["env.size"].description == "How many."
    assert fields["env.needed"].is_required()
    made: Any = get_prefixed_pydantic_model(Settings, "env.")(**{"env.size": 0, "env.needed": "x"})
    assert extract_namespace(made, "env.") == {"size": 0, "names": ["a"], "needed": "x"}


def test_a_namespace_of_a_dict_is_extracted_too() -> None:
    assert extract_namespace({"env.a": 1, "openai.b": 2, "slurm": True}, "env.") == {"a": 1}


def test_dicts_are_merged_in_depth_and_left_as_they_were() -> None:
    first = {"a": {"b": 1, "c": 2}, "d": 1}

    assert merge_dicts(first, {"a": {"c": 3}}, {"d": {"e": 1}}) == {"a": {"b": 1, "c": 3}, "d": {"e": 1}}
    assert first == {"a": {"b": 1, "c": 2}, "d": 1}


def test_defaults_are_adjusted_in_a_subclass() -> None:
    adjusted: Any = adjust_model_defaults(Settings, {"size": 9, "needed": "given", "unknown": 1})

    assert issubclass(adjusted, Settings)
    assert (adjusted().size, adjusted().needed, adjusted().names) == (9, "given", ["a"])
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        adjusted(size=0)
    assert adjusted.model_fields["size"].description == "How many."
    adjusted = adjust_model_defaults(Settings, Settings(size=3, needed="y"))
    assert adjusted().needed == "y"


def test_flags_of_the_command_line_are_found_with_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "env.py",
        "serve",
        "--env.total_steps",
        "-1",
        "--env.weight=-0.5",
        "--slurm",
        "--name",
        "None",
        "--words",
        "a",
        "b",
        "--last",
    ]
    monkeypatch.setattr("sys.argv", words)

    assert get_double_dash_flags() == {
        "env.total_steps": "-1",
        "env.weight": "-0.5",
        "slurm": True,
        "name": None,
        "words": ["a", "b"],
        "last": True,
    }


def test_a_summary_of_numbers_is_added_to_the_metrics() -> None:
    metrics = get_std_min_max_avg("t", [1.0, 3.0], {"other": 1})

    assert metrics == {"other": 1, "t_mean": 2.0, "t_std": 1.0, "t_max": 3.0, "t_min": 1.0}
    with pytest.raises(ValueError, match="mean of nothing"):
        get_std_min_max_avg("t", [], {})


def test_the_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    display_metrics_table("math", {"accuracy": 0.5, "count|all": 12}, 10.0, 12.5)

    assert capsys.readouterr().out.splitlines() == [
        "## math",
        "",
        "| metric     |  value |",
        "|:-----------|-------:|",
        "| accuracy   | 0.5000 |",
        "| count\\|all |     12 |",
        "",
        "2.5 s",
    ]
