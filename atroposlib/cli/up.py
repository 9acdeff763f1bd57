"""atropos up: start the whole loop on this machine from one YAML file, show it, end it cleanly, report on it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from atroposlib.launch.config import UpConfig
    from atroposlib.launch.processes import ChildFailedError
    from atroposlib.launch.run_folder import RunFolder

EXAMPLES = """examples:
  atropos up recipe=smoke_cpu                          are all processes there? two steps on scripted answers, no model
  atropos up recipe=teacher_quickstart                 the same as --config configs/teacher_quickstart.yaml
  atropos up --config configs/demo.yaml
  atropos up --config configs/demo.yaml name=try2 seed=1 trainer.max_steps=8
  atropos up --config configs/demo.yaml environments.0.options.max_token_length=128
  atropos up --config configs/demo.yaml --dry-run      show the config and every command line, start nothing
  atropos up --resume runs/demo                        go on where an interrupted run was
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "up",
        help="start the whole loop on this machine",
        description="Starts rollout server, inference server, environments and trainer, shows the run, restarts "
        "what dies, ends everything on Ctrl-C, and leaves a run folder with checkpoint and report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file, e.g. configs/demo.yaml")
    parser.add_argument("--resume", metavar="RUN_DIR", type=Path, help="go on with this unfinished run")
    parser.add_argument("--dry-run", action="store_true", help="print config and commands, start nothing")
    parser.add_argument("--plain", action="store_true", help="print lines instead of the live view")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="override a key of the config, e.g. trainer.max_steps=8; recipe=NAME takes configs/NAME.yaml as the config",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the loop to its end."""
    # Imported here: `atropos --help` should not wait for them.
    from atroposlib.launch.processes import ChildFailedError
    from atroposlib.launch.report import write_report
    from atroposlib.launch.run_folder import RunFolder
    from atroposlib.launch.summary import summary_table
    from atroposlib.launch.up import InterruptedRunError, Up, make_plan

    config, folder = _config_and_folder(arguments)
    if arguments.dry_run:
        # The folder is only named here; ports of 0 are drawn as they would be.
        plan = make_plan(config, folder or RunFolder(config.runs_dir / config.name))
        print(f"# resolved config\n{config.to_yaml()}\n{plan.describe()}")
        return 0
    plan = make_plan(config, folder or RunFolder(config.runs_dir / config.name))
    if folder is None:
        folder = RunFolder.create(config.runs_dir, config.name)
        plan = plan.in_folder(folder)
    logging.basicConfig(
        filename=folder.logs / "atropos.log",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    # It asks the rollout server twice a second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    console = Console()
    console.print(f"run folder: {folder.path}", soft_wrap=True, highlight=False)
    try:
        summary = asyncio.run(Up(plan, console, is_live=console.is_terminal and not arguments.plain).run())
    except ChildFailedError as error:
        _explain_failure(error, folder)
        return 1
    except InterruptedRunError as error:
        print(f"{error}; every process has ended", file=sys.stderr)
        print(f"hint: go on with: atropos up --resume {folder.path}", file=sys.stderr)
        return 128 + error.number
    page = write_report(folder, summary)
    console.print(summary_table(summary))
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    return 0


def _config_and_folder(arguments: argparse.Namespace) -> tuple[UpConfig, RunFolder | None]:
    from atroposlib.launch.config import LaunchConfigError, load_config
    from atroposlib.launch.run_folder import RunFolder

    file, overrides = _file_and_overrides(arguments)
    if arguments.resume is None:
        if file is None:
            raise LaunchConfigError("atropos up needs a config", hint="try recipe=demo, or --config FILE")
        return load_config(file, overrides).absolute(), None
    if file is not None:
        raise LaunchConfigError(
            "--resume goes on with the config of that run; leave --config and recipe= away",
            hint="override single keys instead, e.g. trainer.max_steps=40",
        )
    folder = RunFolder(arguments.resume.absolute())
    if not folder.config.is_file():
        raise LaunchConfigError(
            f"{arguments.resume} is not the folder of a run: it has no {folder.config.name}",
            hint="atropos up prints the folder of each run; they are in runs/ unless runs_dir says otherwise",
        )
    if folder.summary.is_file():
        raise LaunchConfigError(
            f"the run {folder.run_id} is over: it has its {folder.summary.name}",
            hint=f"`atropos report {arguments.resume}` shows it; a new run starts with --config",
        )
    return load_config(folder.config, overrides), folder


def _file_and_overrides(arguments: argparse.Namespace) -> tuple[Path | None, list[str]]:
    from atroposlib.launch.config import LaunchConfigError
    from atroposlib.launch.recipes import recipe_file, split_recipe

    recipe, overrides = split_recipe(arguments.overrides)
    if recipe is None:
        return arguments.config, overrides
    if arguments.config is not None:
        raise LaunchConfigError(
            f"recipe={recipe} and --config {arguments.config} are two configs; give one of them",
            hint=f"for a preset of the trainer: --config {arguments.config} trainer.recipe={recipe}",
        )
    return recipe_file(recipe), overrides


def _explain_failure(error: ChildFailedError, folder: RunFolder) -> None:
    print(f"error: {error}", file=sys.stderr)
    if error.tail:
        print(f"the last lines of {error.log_path}:", file=sys.stderr)
        print("".join(f"  | {line}\n" for line in error.tail.splitlines()), end="", file=sys.stderr)
    print(
        f"hint: every process has ended; once it is mended, go on with: atropos up --resume {folder.path}",
        file=sys.stderr,
    )
