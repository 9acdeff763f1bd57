"""The tutorial's tests pass, its commands exist, and its files stand by themselves. tests/docs runs its environments."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from atroposlib.cli.main import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "writing-an-environment.md"
TEXT = PAGE.read_text()
FILES = re.findall(r"```python(?: test)?\n# (\S+\.py)\n(.*?)```", TEXT, flags=re.S)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)
    for line in block.splitlines()
    if line.startswith("atropos ")
]


def test_the_tests_of_the_tutorial_pass(tmp_path: Path) -> None:
    for name, code in FILES:
        (tmp_path / name).write_text(code)

    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path, capture_output=True, text=True, timeout=90,
    )  # fmt: skip

    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 passed" in result.stdout


def test_every_python_block_names_its_file() -> None:
    assert len(FILES) == len(re.findall(r"```python", TEXT))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_atropos_command_can_be_typed(command: str) -> None:
    words = shlex.split(command, comments=True)

    assert build_parser().parse_args(words[1:]).run is not None


def test_every_check_of_the_table_exists_and_every_check_is_in_the_table() -> None:
    sources = [PAGE.parents[1] / "atroposlib" / "testing" / name for name in ("group_checks.py", "stage_checks.py")]
    found = set(re.findall(r'(?:Finding|_error)\(\s*"([a-z_]+)"', "".join(source.read_text() for source in sources)))
    table = TEXT[TEXT.index("| check | finds |") : TEXT.index("The exit status is 1")]

    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))

    assert set(re.findall(r"`([a-z_]+)`", first_cells)) == found


def test_links_within_the_page_lead_to_a_heading() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }

    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings
