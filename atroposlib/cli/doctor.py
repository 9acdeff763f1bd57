"""atropos doctor: what is wrong with a run, and how to mend it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from atroposlib.cli import connection

if TYPE_CHECKING:
    from atroposlib.wire.models import Diagnosis, Finding, Status

EXAMPLES = """exit status: 0 nothing is broken, 1 at least one error, 2 the server could not be asked

examples:
  atropos doctor                            ask the rollout server on this machine
  atropos doctor http://gpu-host:8000       ask another
  atropos doctor --json | jq .findings      for scripts
"""
STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="say what is wrong with a run, and the fix",
        description="Asks the rollout server who is silent, who waits for whom, and what can never work.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", metavar="URL", nargs="?", default=connection.DEFAULT_URL, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the diagnosis as the server gives it")
    connection.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 when one of them is an error."""
    status, diagnosis = asyncio.run(_ask(arguments.url, arguments.token))
    if arguments.json:
        print(diagnosis.model_dump_json(indent=2))
    else:
        Console().print(render(status, diagnosis.findings))
    return int(any(finding.severity == "error" for finding in diagnosis.findings))


async def _ask(url: str, token: str | None) -> tuple[Status, Diagnosis]:
    async with connection.connect(url, token) as client:
        return await client.status(), await client.diagnosis()


def render(status: Status, findings: Sequence[Finding]) -> RenderableType:
    """The findings, each with its fix below it."""
    about = f"run {status.run_name}, step {status.step}/{status.num_steps}" if status.run_name else "no run"
    if not findings:
        return Text.assemble(("healthy", "bold green"), f"  {about}")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.severity, style=STYLES[finding.severity]), _words(finding))
    return Group(Text(about, style="dim"), table)


def _words(finding: Finding) -> Text:
    return Text.assemble((finding.subject, "bold"), f": {finding.problem}\n", ("fix: ", "green"), finding.fix)
