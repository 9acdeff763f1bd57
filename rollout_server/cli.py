"""run-api: start the rollout server."""

from __future__ import annotations

import argparse
import socket
import sys
from typing import Any, NoReturn

import uvicorn
from pydantic import ValidationError

from rollout_server.app import create_app
from rollout_server.config import ServerConfig

EXAMPLES = """examples:
  run-api                                      serve on 127.0.0.1:8000, data in ./rollout_server_data
  run-api --port 8100 --data-dir /data/run1    another port and folder; start again on it to go on
  run-api --synchronous normal                 survive SIGKILL but not a power cut, with fewer disk flushes
"""


def main(argv: list[str] | None = None) -> None:
    """Parse, check, serve until SIGTERM or Ctrl-C."""
    config = _parse(sys.argv[1:] if argv is None else argv)
    listener = _listen(config)
    print(
        f"rollout server on http://{config.host}:{listener.getsockname()[1]}, data in {config.data_dir.resolve()}",
        flush=True,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(config),
            log_level=config.log_level,
            access_log=config.log_level == "debug",
            timeout_graceful_shutdown=5,
            loop="uvloop",
            http="httptools",
        )
    )
    server.run(sockets=[listener])


def _parse(argv: list[str]) -> ServerConfig:
    parser = argparse.ArgumentParser(
        prog="run-api",
        description="The rollout server: environments push groups, trainers lease batches.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, info in ServerConfig.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=None,
            metavar="VALUE",
            help=f"{info.description or name} (default: {info.default})",
        )
    given: dict[str, Any] = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        return ServerConfig(**given)
    except ValidationError as error:
        problems = "; ".join(
            f"--{str(item['loc'][0]).replace('_', '-')}={item['input']}: {item['msg']}" for item in error.errors()
        )
        _fail(problems, "run-api --help shows every option with its default")


def _listen(config: ServerConfig) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        _fail(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}",
            "choose another --port, or 0 for a free one",
        )
    return listener


def _fail(problem: str, hint: str) -> NoReturn:
    print(f"error: {problem}\nhint: {hint}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
