"""The command line of an environment: `python my_env.py serve|process|evaluate [options]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.commands import overridden_command, parse_command
from atroposlib.envs.command_line.help_text import command_help, help_text, usage
from atroposlib.envs.command_line.launching import complain, launch, mode_defaults
from atroposlib.envs.command_line.options import Defaults, resolve
from atroposlib.envs.command_line.usage import UsageError
from atroposlib.errors import ConfigError

MODES = {
    "serve": "collect groups for a trainer through the rollout server",
    "process": "write total_steps groups to a JSONL file and an HTML page; no rollout server",
    "evaluate": "run evaluate() once and write its metrics; no rollout server",
}
USAGE_STATUS = 2


def main(env_cls: type[BaseEnv], argv: Sequence[str] | None = None) -> None:
    """Parse, build, run. Exits with 2 for a mistake in the options, 1 when the run fails."""
    args = list(sys.argv[1:] if argv is None else argv)
    script = Path(sys.argv[0]).name or "env.py"
    try:
        if not args:
            print(usage(script, MODES), file=sys.stderr)
            sys.exit(USAGE_STATUS)
        mode, *options = args
        if any(arg in ("-h", "--help") for arg in args):
            print(_help(env_cls, mode, script))
            sys.exit(0)
        if mode not in MODES:
            raise UsageError(f"unknown command {mode!r}", f"use one of: {', '.join(MODES)}")
        _run_mode(env_cls, mode, options)
    except ConfigError as error:
        complain(error)
        sys.exit(USAGE_STATUS)


def _run_mode(env_cls: type[BaseEnv], mode: str, options: Sequence[str]) -> None:
    command = overridden_command(env_cls, mode)
    if command is not None:
        running: Any = parse_command(command, options)
        running.run()
        return
    changed = mode_defaults(env_cls, mode, env_cls.config_init()[0])
    launch(env_cls, mode, resolve(env_cls, options, mode_defaults=changed))


def _help(env_cls: type[BaseEnv], mode: str, script: str) -> str:
    """With the defaults of the mode, where one is named."""
    command = overridden_command(env_cls, mode) if mode in MODES else None
    if command is not None:
        return command_help(script, mode, command)
    defaults = Defaults.of(env_cls)
    if mode in MODES:
        defaults = defaults.with_mode(mode_defaults(env_cls, mode, defaults.env))
    authored = env_cls.__mro__[: env_cls.__mro__.index(BaseEnv)]
    summary = next((cls.__doc__ for cls in authored if cls.__doc__), "")
    first_line = next(iter(summary.strip().splitlines()), "")
    return help_text(script, first_line, MODES, defaults)
