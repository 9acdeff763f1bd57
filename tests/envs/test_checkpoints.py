"""State of an environment across restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.checkpoints import load_state, save_state


def test_what_is_saved_is_found_under_the_upstream_path(tmp_path: Path) -> None:
    path = save_state(tmp_path, "math_0", 20, {"iter": 7})

    assert path == tmp_path / "env_checkpoints" / "math_0" / "step-20.json"
    assert json.loads(path.read_text()) == {"iter": 7}
    assert load_state(tmp_path, "math_0", 20) == (20, {"iter": 7})
    assert [entry.name for entry in path.parent.iterdir()] == ["step-20.json"]


@given(saved=st.sets(st.integers(0, 30), max_size=5), step=st.integers(0, 30))
def test_the_newest_step_that_is_not_ahead_of_training_is_loaded(saved: set[int], step: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for each in saved:
            save_state(Path(folder), "env", each, {"at": each})

        found = load_state(Path(folder), "env", step)

    best = max((each for each in saved if each <= step), default=None)
    assert found == (None if best is None else (best, {"at": best}))


@pytest.mark.parametrize(
    ("saved_as", "asked_as"), [("math", "math_3"), ("math_0", "math_3"), ("math_0", "math"), ("a/b", "a/b_1")]
)
def test_a_restarted_environment_finds_its_state_though_its_number_changed(
    tmp_path: Path, saved_as: str, asked_as: str
) -> None:
    save_state(tmp_path, saved_as, 4, {"iter": 1})

    assert load_state(tmp_path, asked_as, 9) == (4, {"iter": 1})


def test_another_environments_state_is_left_alone(tmp_path: Path) -> None:
    save_state(tmp_path, "mathematics_0", 4, {"iter": 1})
    save_state(tmp_path, "mat", 4, {"iter": 1})

    assert load_state(tmp_path, "math_0", 9) is None


def test_its_own_name_wins_over_a_newer_state_of_the_base_name(tmp_path: Path) -> None:
    save_state(tmp_path, "math_1", 4, {"iter": 1})
    save_state(tmp_path, "math", 8, {"iter": 2})

    assert load_state(tmp_path, "math_1", 9) == (4, {"iter": 1})


def test_a_broken_file_is_passed_over(tmp_path: Path) -> None:
    save_state(tmp_path, "math", 4, {"iter": 1})
    save_state(tmp_path, "math", 8, {"iter": 2}).write_text('{"iter": ')

    assert load_state(tmp_path, "math", 9) == (4, {"iter": 1})


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    save_state(tmp_path, "math", 4, {"iter": 1})
    unserialisable: dict[str, Any] = {"iter": object()}

    with pytest.raises(TypeError):
        save_state(tmp_path, "math", 4, unserialisable)

    assert load_state(tmp_path, "math", 4) == (4, {"iter": 1})
