"""atropos check: run an environment against a mock inference server, and say what is wrong with it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from atroposlib.testing.findings import CheckReport

EXAMPLES = """exit status: 0 no error, 1 at least one, 2 there is nothing to check

examples:
  atropos check my_env.py                              random words for answers
  atropos check my_env.py --one-of 4 --one-of 5        answers that the reward tells apart
  atropos check my_env.py --rule '(\\d+) \\+ 0=>\\1'       answers by what is asked
  atropos check my_env.py --tokenizer models/SmolLM2-135M-Instruct --set max_token_length=256
  atropos check my_envs.py --class MyEnv --json | jq .findings
"""
STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    from atroposlib.cli.mock_inference import add_answers

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="run an environment against a mock, and say what is wrong with it",
        description="Runs config_init, setup, get_next_item, a few rollouts and evaluate. No model, no rollout server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the environment's Python file")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="which environment of the file")
    parser.add_argument("--items", type=int, default=4, metavar="N", help="items to roll out; default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the config")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or Hugging Face name; default: bytes")
    parser.add_argument("--deadline", type=float, default=60.0, metavar="SECONDS", help="of each stage; default: 60")
    parser.add_argument("--no-evaluate", action="store_true", help="leave evaluate() out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    parser.add_argument("--json", action="store_true", help="print the report for scripts")
    add_answers(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 when something is wrong."""
    # The outage that the check stages is no news.
    logging.getLogger("atroposlib").setLevel(logging.CRITICAL)
    # What the environment prints must not mix with the report.
    with contextlib.redirect_stdout(sys.stderr):
        report = asyncio.run(_check(arguments))
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(render(report))
    return int(not report.ok or (arguments.strict and bool(report.warnings)))


async def _check(arguments: argparse.Namespace) -> CheckReport:
    from atroposlib.cli.mock_inference import chosen_policy
    from atroposlib.testing import check_env

    report: CheckReport = await check_env(
        arguments.file,
        reply=chosen_policy(arguments),
        class_name=arguments.class_name,
        n_items=arguments.items,
        config=parse_settings(arguments.set),
        tokenizer_name=arguments.tokenizer,
        deadline_s=arguments.deadline,
        runs_evaluate=not arguments.no_evaluate,
    )
    return report


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` each, the value as YAML."""
    import yaml

    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set is KEY=VALUE, e.g. --set group_size=2, not {text!r}")
        settings[key] = yaml.safe_load(value)
    return settings


def render(report: CheckReport) -> RenderableType:
    """The findings, each with its fix below it, and what was run."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    verdict = ("fails", "bold red") if not report.ok else ("works", "bold green")
    head = Text.assemble((report.env_name, "bold"), " ", verdict)
    ran = (
        f"{report.items} items, {report.groups} groups, {report.sequences} sequences, {report.requests} completions, "
        f"evaluate {'ran' if report.is_evaluated else 'did not run'}"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in report.findings:
        table.add_row(Text(finding.severity, style=STYLES[finding.severity]), Text(finding.message))
        if finding.where:
            table.add_row("", Text(f"at {finding.where}", style="dim"))
        if finding.fix:
            table.add_row("", Text(f"fix: {finding.fix}"))
    return Group(head, *([table] if report.findings else []), Text(ran, style="dim"))
