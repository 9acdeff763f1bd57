"""atropos replay: serve a recorded run to a trainer, batch for batch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from rollout_server import logs
from rollout_server.app import create_app
from rollout_server.config import ServerConfig
from rollout_server.config_sources import resolve
from rollout_server.http.serving import listen, make_server
from rollout_server.run_database.recorded import open_recorded
from rollout_server.run_database.replay_store import ReplayStore
from rollout_server.stores.base import Store

EXAMPLES = """The trainer opens a run of any name with the recorded batch_size, and is given the batches that were formed then, the
same bytes in the same order. No environment and no inference server is needed. The recorded run is only read.

examples:
  atropos replay data/run1                                replay the run of data/run1 on 127.0.0.1:8000
  atropos replay data/run1/archive/demo-... --port 8100   an archived run
  atropos replay data/run1 --seconds-per-step 2           not faster than a step every two seconds
  atropos replay data/run1 --config server.yaml           with the tokens and limits of a server's configuration
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit status.

    Raises:
        ConfigError: the folder holds no run, or the address is taken.
    """
    arguments = _parser().parse_args(argv)
    with closing(open_recorded(arguments.folder)) as recorded:  # a wrong folder is told before anything starts
        run = recorded.run
    flags = {name: getattr(arguments, name) for name in ("host", "port") if getattr(arguments, name) is not None}
    config = resolve(flags, os.environ, arguments.config)
    logs.set_up(config.log_level, config.log_format)
    listener = listen(config)
    print(
        f"replay of run {run.run_name} on http://{config.host}:{listener.getsockname()[1]},"
        f" batch_size={run.request.batch_size}",
        flush=True,
    )
    opener = partial(_open, arguments.folder, arguments.seconds_per_step)
    make_server(create_app(config, open_store=opener), config).run(sockets=[listener])
    return 0


async def _open(folder: Path, seconds_per_step: float, config: ServerConfig) -> Store:
    return await ReplayStore.open(folder, seconds_per_step=seconds_per_step)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atropos replay",
        description="Serves a recorded run to a trainer, to reproduce or audit a training run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="--data-dir of the server, or an archived run in it"
    )
    parser.add_argument("--host", default=None, help="default: 127.0.0.1")
    parser.add_argument("--port", default=None, help="default: 8000; 0 picks a free one")
    parser.add_argument(
        "--seconds-per-step",
        metavar="S",
        type=_pace,
        default=0.0,
        help="give a step no sooner than this after the one before; default: as fast as the trainer asks",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, default=None, help="YAML file of run-api's options")
    return parser


def _pace(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 up")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
