"""run-api: start the rollout server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from atroposlib.errors import ConfigError
from rollout_server import logs
from rollout_server.app import create_app
from rollout_server.config import ServerConfig
from rollout_server.config_sources import masked_yaml, nearest, resolve
from rollout_server.http.serving import listen, make_server
from rollout_server.tuning import tune_process

EXAMPLES = """Flags win over environment variables (ATROPOS_SERVER_PORT=8100), those over the file, the file over the defaults.

examples:
  run-api                                      serve on 127.0.0.1:8000, data in ./rollout_server_data
  run-api --port 8100 --data-dir /data/run1    another port and folder; start again on it to go on
  run-api --synchronous normal                 survive SIGKILL but not a power cut, with fewer disk flushes
  run-api --host 0.0.0.0 --token-file tokens.yaml --ssl-certfile cert.pem --ssl-keyfile key.pem
  run-api --config server.yaml --dry-run       print the resolved configuration and stop
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, serve until SIGTERM or Ctrl-C."""
    given = vars(_parser().parse_args(sys.argv[1:] if argv is None else argv))
    config_file: Path | None = given.pop("config")
    is_dry_run: bool = given.pop("dry_run")
    try:
        config = resolve({key: value for key, value in given.items() if value is not None}, os.environ, config_file)
        if is_dry_run:
            print(masked_yaml(config), end="")
            return
        _serve(config)
    except ConfigError as error:
        _fail(str(error), "run-api --help shows every option with its default")


def _serve(config: ServerConfig) -> None:
    tune_process()
    logs.set_up(config.log_level, config.log_format)
    listener = listen(config)
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(
        f"rollout server on {scheme}://{host}:{listener.getsockname()[1]}, data in {config.data_dir.resolve()}",
        flush=True,
    )
    make_server(create_app(config), config).run(sockets=[listener])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            name = unknown.split()[0].partition("=")[0]
            _fail(f"unknown option {name}; {nearest(name.lstrip('-'))}", "run-api --help shows every option")
        _fail(message, "run-api --help shows every option with its default")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run-api",
        description="The rollout server: environments push groups, trainers lease batches.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options, and of tokens by role")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration as YAML and stop")
    for name, info in ServerConfig.model_fields.items():
        if name != "tokens":  # secrets on a command line are for everybody to read
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=None, **_argument(name, info))
    return parser


def _argument(name: str, info: FieldInfo) -> dict[str, Any]:
    default = "none" if info.default in (None, ()) else info.default
    text = f"{info.description or name} (default: {default})".replace("%", "%%")
    if info.annotation is bool:  # --insecure alone, or --insecure false
        return {"nargs": "?", "const": "true", "metavar": "BOOL", "help": text}
    return {"metavar": "VALUE", "help": text}


def _fail(problem: str, hint: str) -> NoReturn:
    print(f"error: {problem}\nhint: {hint}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
