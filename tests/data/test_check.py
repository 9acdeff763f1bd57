"""python -m atroposlib.data check: the funnel, the bad lines with their numbers, and a row."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from atroposlib.data.__main__ import main
from atroposlib.data.check import EXAMPLES, configured, n_bad_lines
from atroposlib.data.config import DataConfig
from atroposlib.data.guess import guessed
from atroposlib.data.load import Splits
from atroposlib.errors import DataError
from atroposlib.teaching.config import TeacherEnvConfig
from tests.data.conftest import Write
from tests.data.sessions import a_session


def test_a_good_file_is_shown(written: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = written([{"prompt": f"q{n}", "ground_truth": "x" * 1000} for n in range(20)])

    assert main(["check", str(path), "eval_split_ratio=0.25"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:5]] == [["read", "20"], ["usable", "20"], ["train", "15"], ["eval", "5"]]
    assert '  prompt: "q' in "\n".join(lines)
    assert max(map(len, lines)) < 400, "long values are cut"


def test_bad_lines_are_named_on_the_command_line(written: Write) -> None:
    path = written('{"prompt": "a"}\n{"prompt": \n{"prompt": "b"}\n{}\n')
    command = [sys.executable, "-m", "atroposlib.data", "check", str(path)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert f"{path}, line 2: not JSON" in done.stderr
    assert f"{path}, line 4: columns none: expected a question" in done.stderr
    assert "2 lines cannot be used" in done.stdout


@pytest.mark.parametrize(
    ("funnel", "n_bad"),
    [
        ({"read": 5, "usable": 3, "train": 3}, 2),
        ({"read": 5, "usable": 5, "validation: read": 4, "validation: usable": 1}, 3),
        ({"read": 5, "usable": 4, "capped": 2, "validation: read": 4, "validation: usable": 2}, 3),
        ({"selected": 7, "usable": 6}, 1),
        ({"made": 7, "train": 6}, 0),
        ({"read": 7, "train": 6}, 0),
    ],
)
def test_bad_lines_of_every_split_count(funnel: dict[str, int], n_bad: int) -> None:
    assert n_bad_lines(Splits([{}], [], funnel)) == n_bad


def test_bad_lines_to_evaluate_on_are_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    funnel = {"read": 2, "usable": 2, "validation: read": 2, "validation: usable": 1, "train": 2, "eval": 1}
    monkeypatch.setattr("atroposlib.data.check.load_splits", lambda _: Splits([{"prompt": "q"}], [], funnel))

    assert main(["check", "owner/name", "val_split=validation"]) == 1

    assert "1 lines cannot be used" in capsys.readouterr().out


def test_traces_are_recognised(written: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(written([a_session()]))]) == 0

    assert "loader=runtime_traces" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "guess"),
    [
        ('{"prompt": "q", "ground_truth": "a"}', {}),
        ('{"prompt": "q", "completion": "a"}', {"form": "conversation"}),
        ('{"messages": [{"role": "user", "content": "q"}]}', {}),
        ('{"text": "t"}', {"form": "conversation"}),
        ('{"task": "t"}', {}),
        ('broken\n{"task": "t", "steps": []}', {"loader": "runtime_traces"}),
        ("broken", {}),
    ],
)
def test_what_a_file_holds_is_told_by_its_first_row(written: Write, line: str, guess: dict[str, str]) -> None:
    assert guessed(str(written(line))) == guess


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["absent.jsonl"], "cannot read the data set"),
        (["absent.jsonl", "shuffel=false"], "shuffel"),
        (["absent.jsonl", "seed"], "'seed' is no KEY=VALUE"),
        (["absent.jsonl", "loader=rowz"], "did you mean 'rows'"),
        (["absent.jsonl", "--preset", "gsm8k_grpo", "seed"], "'seed' is no KEY=VALUE"),
    ],
)
def test_mistakes_become_a_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2

    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("line", [line.strip() for line in EXAMPLES.splitlines()[1:]])
def test_every_example_is_understood(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[DataConfig] = []

    def load(config: DataConfig) -> Splits:
        loaded.append(config)
        return Splits([{"prompt": "q"}], [], {"read": 1, "usable": 1})

    monkeypatch.setattr("atroposlib.data.check.load_splits", load)
    words = shlex.split(line.partition("    (")[0])

    assert words[:3] == ["python", "-m", "atroposlib.data"]
    assert main(words[3:]) == 0
    settings = [word.partition("=")[0] for word in words if "=" in word]
    assert loaded[0].model_fields_set >= set(settings)


def test_an_option_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", "absent.jsonl", "--perset", "gsm8k_grpo"])

    assert "--perset" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"db_ulr": "URL"}, {"db_url": ["URL"]}, {"limit": "URL"}])
def test_a_mistyped_key_shows_no_password(wrong: dict[str, Any]) -> None:
    secret = "postgresql://me:s3cret@host/db"
    values = {name: [secret] if isinstance(value, list) else secret for name, value in wrong.items()}

    for model, given in ((DataConfig, values), (TeacherEnvConfig, {"data": values})):
        with pytest.raises(ValidationError) as caught:
            model.model_validate(given)
        assert "s3cret" not in str(caught.value)


def test_settings_of_the_command_line_win(written: Write) -> None:
    path = str(written([a_session()]))

    assert configured(path, None, ["loader=rows", "seed=3"]).loader == "rows"
    assert configured(path, "gsm8k_grpo", []).loader == "math"
    assert configured("owner/name", None, ["keep_columns=[prompt]"]).keep_columns == ("prompt",)
    assert configured("min_reward=0.5", "runtime_pg", ["limit=3"]).min_reward == 0.5
    with pytest.raises(DataError, match="limit"):
        configured(None, "runtime_pg", ["limit=none"])
