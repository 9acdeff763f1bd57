"""python -m atroposlib.data check: the funnel, the bad lines with their numbers, and a row."""

from __future__ import annotations

import subprocess
import sys

import pytest

from atroposlib.data.__main__ import main
from atroposlib.data.check import configured
from atroposlib.data.guess import guessed
from atroposlib.errors import DataError
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
    ],
)
def test_mistakes_become_a_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2

    assert complaint in capsys.readouterr().err


def test_settings_of_the_command_line_win(written: Write) -> None:
    path = str(written([a_session()]))

    assert configured(path, None, ["loader=rows", "seed=3"]).loader == "rows"
    assert configured(path, "gsm8k_grpo", []).loader == "math"
    assert configured("owner/name", None, ["keep_columns=[prompt]"]).keep_columns == ("prompt",)
    assert configured("min_reward=0.5", "runtime_pg", ["limit=3"]).min_reward == 0.5
    with pytest.raises(DataError, match="limit"):
        configured(None, "runtime_pg", ["limit=none"])
