"""How subcommands that talk to a rollout server are told which, and with what token."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atroposlib.client import RolloutClient

DEFAULT_URL = "http://localhost:8000"
DEADLINE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --token to a subcommand."""
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        default=None,
        help="bearer token of any role; better in ATROPOS_TOKEN, where no process list shows it",
    )


def connect(url: str, token: str | None) -> RolloutClient:
    """A client that gives up soon, because somebody looks on."""
    # Imported here: `atropos --help` should not wait for it.
    from atroposlib.client import RolloutClient

    # The subcommand itself says what does not answer.
    logging.getLogger("atroposlib.client").setLevel(logging.ERROR)
    if "://" not in url:
        url = f"http://{url}"
    return RolloutClient(url, deadline_s=DEADLINE_S, token=token)
