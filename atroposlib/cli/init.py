"""atropos init: a new environment with its test, both of which run at once."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from atroposlib.errors import ConfigError

EXAMPLES = """examples:
  atropos init my_task                      my_task.py and test_my_task.py in this folder
  atropos init my_task --folder environments
  pytest test_my_task.py                    passes
  atropos check my_task.py                  says what could be better
"""
NAME = re.compile(r"[a-z][a-z0-9_]*")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "init",
        help="write a new environment and its test",
        description="Writes NAME.py, an environment that runs, and test_NAME.py, a test that passes. Overwrites nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="in lower_case, e.g. my_task")
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where; default: here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write both files and say what to do with them."""
    environment, test = scaffold(arguments.name, arguments.folder)
    print(f"wrote {environment} and {test}")
    print("next:")
    print(f"  pytest {test}")
    print(f"  atropos check {environment}")
    print(f"  python {environment} process --help")
    return 0


def scaffold(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the environment and its test.

    Raises:
        ConfigError: the name cannot be a module's, or one of the files is there already.
    """
    check_name(name)
    environment, test = folder / f"{name}.py", folder / f"test_{name}.py"
    for path in (environment, test):
        if path.exists():
            raise ConfigError(f"{path} is there already and stays as it is; choose another name or --folder")
    values = {"name": name, "class_name": class_name(name), "test_file": test.name}
    texts = {
        environment: _render("environment.py.jinja", values),
        test: _render("test_environment.py.jinja", values),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            # "x": a file that appeared meanwhile is not overwritten either.
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
    return environment, test


def check_name(name: str) -> None:
    """A name is that of a module which hides no other.

    Raises:
        ConfigError: it is not.
    """
    if NAME.fullmatch(name) is None:
        proposal = re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).strip("_").lower()
        hint = f"; {proposal!r} would do" if NAME.fullmatch(proposal) else ""
        raise ConfigError(f"{name!r} cannot be the name of an environment: use lower case, digits and _{hint}")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or name in ("atroposlib", "test", "base", "base_env"):
        raise ConfigError(f"{name!r} means something to Python or the SDK already; {name}_task would do")


def class_name(name: str) -> str:
    """my_task becomes MyTaskEnv."""
    words = "".join(word.capitalize() for word in name.split("_"))
    return words if words.endswith("Env") else f"{words}Env"


def _render(template: str, values: dict[str, str]) -> str:
    import jinja2

    source = (files("atroposlib.cli") / "templates" / template).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(source).render(values)
