"""atropos report: count a run again and write its report again, from the files of its folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

EXAMPLES = """examples:
  atropos report runs/demo         rebuild report.html and report.png, print the summary
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="rebuild the report of a run",
        description="Counts a run again from its ledgers and writes report.html and report.png again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run, e.g. runs/demo")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Rebuild the report."""
    # Imported here: `atropos --help` should not wait for them.
    from atroposlib.launch.config import LaunchConfigError, load_config
    from atroposlib.launch.report import write_report
    from atroposlib.launch.run_folder import RunFolder
    from atroposlib.launch.summary import summarise, summary_table

    folder = RunFolder(arguments.run_dir.absolute())
    if not folder.events.is_file():
        raise LaunchConfigError(
            f"{arguments.run_dir} is not the folder of a run: it has no {folder.events.name}",
            hint="atropos up prints the folder of each run; they are in runs/ unless runs_dir says otherwise",
        )
    config = load_config(folder.config)
    is_over = folder.summary.is_file()
    summary = summarise(
        folder,
        outcome="finished" if is_over else "not finished",
        max_staleness_allowed=config.trainer.max_staleness,
    )
    if is_over:
        summary.write(folder.summary)
    page = write_report(folder, summary)
    console = Console()
    console.print(summary_table(summary))
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    return 0
