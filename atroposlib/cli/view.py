"""atropos view: watch a run, live, from the counters and events of its rollout server. It only reads."""

from __future__ import annotations

import argparse
import asyncio
import re
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from atroposlib.cli import connection
from atroposlib.cli.plugins import run_plugin
from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from atroposlib.cli.watch import Watch
    from atroposlib.client import RolloutClient

EXAMPLES = """examples:
  atropos view                              the rollout server on this machine, live; Ctrl-C ends the view only
  atropos view http://gpu-host:8000         another one
  atropos view --once                       one look, then the end: for scripts
  atropos view data/run1/archive/demo-...   the groups of a run that is over, from its folder
"""
PERIOD_S = 1.0


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to `atropos`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "view",
        help="watch a run live, or look at the folder of one",
        description="Shows progress, queue, environments, inference servers, and who waits for whom. Changes nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="URL|FOLDER", nargs="?", default=connection.DEFAULT_URL, help="default: %(default)s"
    )
    parser.add_argument("--once", action="store_true", help="show the run as it stands and end")
    connection.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the run; ends with Ctrl-C, or at once."""
    if Path(arguments.target).is_dir():
        return run_plugin("records", [arguments.target])
    if not _is_url(arguments.target):
        raise ConfigError(
            f"{arguments.target!r} is neither a URL (http://HOST:PORT) nor the folder of a run; is it spelt right?"
        )
    return asyncio.run(_view(arguments.target, arguments.token, is_once=arguments.once))


def _is_url(target: str) -> bool:
    return re.fullmatch(r"https?://\S+|[\w.-]+:\d+", target) is not None


async def _view(url: str, token: str | None, *, is_once: bool) -> int:
    # Imported here: `atropos --help` should not wait for it.
    from atroposlib.cli.watch import Watch

    console = Console()
    async with connection.connect(url, token) as client:
        watch = Watch(client)
        await watch.look()
        if is_once:
            await watch.read_events()
            console.print(watch.picture(width=console.width))
        elif console.is_terminal:
            await _live(watch, console)
        else:
            await _lines(client, console)
    return 0


async def _live(watch: Watch, console: Console) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch.follow_events())
        with Live(watch.picture(width=console.width), console=console, screen=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(PERIOD_S)
                await watch.look_again()
                live.update(watch.picture(width=console.width), refresh=True)


async def _lines(client: RolloutClient, console: Console) -> None:
    """Events as lines, for pipes and logs."""
    from atroposlib.cli.view_screen import event_line

    async with aclosing(client.events()) as events:
        async for event in events:
            console.print(event_line(event), markup=False, highlight=False, soft_wrap=True)
