from __future__ import annotations

import subprocess
import sys

import pytest

from atroposlib.cli.main import main


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    command = f"{sys.executable} -m atroposlib.cli.main up --config configs/demo.yaml --dry-run"

    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stderr == ""


def test_overrides_may_stand_behind_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "recipe=demo", "--dry-run", "sede=1"]) == 2

    assert "unknown key 'sede'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["up", "--dry-run", "--nope", "seed=1"], ["doctor", "URL", "seed=1"]])
def test_words_that_nobody_takes_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)

    assert "unrecognized arguments: " in capsys.readouterr().err
