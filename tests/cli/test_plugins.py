"""Subcommands of other packages are found by entry point, and their absence is told with the fix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atroposlib.cli import plugins
from atroposlib.cli.main import main


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the entry points of the file that the test writes."""
    info = tmp_path / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (tmp_path / "brought_command.py").write_text("def main(argv):\n    print('called with', argv)\n    return 3\n")
    monkeypatch.setattr(plugins, "COMMANDS", {"brought": "a command", "broken": "another"})
    monkeypatch.setattr("atroposlib.cli.main.COMMANDS", plugins.COMMANDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return info / "entry_points.txt"


def test_a_subcommand_gets_its_own_arguments_and_gives_its_status(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed.write_text(f"[{plugins.GROUP}]\nbrought = brought_command:main\n")

    assert main(["brought", "--port", "1", "folder"]) == 3
    assert capsys.readouterr().out == "called with ['--port', '1', 'folder']\n"


def test_a_subcommand_that_is_not_installed_is_told_with_the_fix(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["brought"]) == 2

    assert capsys.readouterr().err == (
        "error: atropos brought comes with the rollout server, which is not installed here\n"
        "hint: pip install 'atroposlib[server]'\n"
    )


def test_a_module_that_a_subcommand_lacks_is_named(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed.write_text(f"[{plugins.GROUP}]\nbroken = no_such_module:main\n")

    assert main(["broken"]) == 2
    assert "needs the module no_such_module" in capsys.readouterr().err


def test_help_lists_every_subcommand_and_loads_neither_client_nor_server() -> None:
    code = (
        "import sys; from atroposlib.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print('loaded', [m for m in ('httpx', 'numpy', 'rollout_server') if m in sys.modules])"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert result.returncode == 0, result.stderr
    for name in ("up", "report", "view", "doctor", "records", "export", "replay"):
        assert f"    {name} " in result.stdout
    assert "loaded []" in result.stdout
