"""The command line of an environment: `python my_env.py serve|process|evaluate [options]`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from atroposlib.client import RolloutClient
from atroposlib.envs.base import BaseEnv
from atroposlib.envs.options import Resolved, RootOptions, UsageError, describe, resolve, type_name
from atroposlib.envs.process import process
from atroposlib.envs.records import RunRecords
from atroposlib.envs.runner import EnvRunner
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.errors import AtroposError, ConfigError

MODES = {
    "serve": "collect groups for a trainer through the rollout server",
    "process": "write total_steps groups to a JSONL file; no rollout server",
    "evaluate": "run evaluate() once and write its metrics; no rollout server",
}


def main(env_cls: type[BaseEnv], argv: Sequence[str] | None = None) -> None:
    """Parse, build, run. Exits with 2 for a mistake in the options, 1 when the run fails."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or any(arg in ("-h", "--help") for arg in args):
            print(help_text(env_cls))
            sys.exit(0 if args else 2)
        mode, *options = args
        if mode not in MODES:
            raise UsageError(f"unknown command {mode!r}", f"use one of: {', '.join(MODES)}")
        resolved = resolve(env_cls, options, mode_defaults=_mode_defaults(env_cls, mode))
        if resolved.root.dry_run:
            print(resolved.as_yaml(), end="")
            return
        _configure_logging(resolved.root.log_level)
        env = env_cls(resolved.env, resolved.servers, slurm=resolved.root.slurm, testing=resolved.root.testing)
    except ConfigError as error:
        _complain(error)
        sys.exit(2)
    try:
        asyncio.run(_run(mode, env, resolved))
    except (AtroposError, ExceptionGroup) as error:
        ours = _our_error(error)
        if ours is None:
            raise
        _complain(ours)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(mode: str, env: BaseEnv, resolved: Resolved) -> Coroutine[Any, Any, None]:
    if mode == "serve":
        return serve(env)
    if mode == "process":
        return _process(env)
    return _evaluate(env, resolved)


async def serve(env: BaseEnv) -> None:
    """Collect until the run is finished, SIGTERM or Ctrl-C."""
    records = RunRecords(env.config.run_dir, env.display_name)
    loop = asyncio.get_running_loop()
    async with RolloutClient(env.config.rollout_server_url, deadline_s=env.config.server_deadline_s) as client:
        runner = EnvRunner(env, client, records)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, runner.stop)
        try:
            await runner.run()
        finally:
            records.close()
            await env.server.close()


async def _process(env: BaseEnv) -> None:
    try:
        path = await process(env, Path(env.config.data_path_to_save_groups))
    finally:
        await env.server.close()
    print(f"groups written to {path}")


async def _evaluate(env: BaseEnv, resolved: Resolved) -> None:
    started = time.time()
    try:
        await env.setup()
        returned = await env.evaluate()
        if env.eval_metrics is None and isinstance(returned, dict):
            await env.evaluate_log(returned, start_time=started)
    finally:
        await env.server.close()
    folder = env.config.data_dir_to_save_evals
    if folder is not None:
        _write_config(Path(folder), resolved)
        print(f"evaluation written to {folder}")


def _write_config(folder: Path, resolved: Resolved) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluate_config.yaml").write_text(resolved.as_yaml(), encoding="utf-8")


def help_text(env_cls: type[BaseEnv]) -> str:
    """Usage, every option with its type, default and meaning, and commands to paste."""
    script = Path(sys.argv[0]).name or "env.py"
    env_config, servers = env_cls.config_init()
    server = servers[0] if isinstance(servers, list) else servers
    shown_server = server if isinstance(server, APIServerConfig) else APIServerConfig(**server.model_dump())
    summary = next((cls.__doc__ for cls in env_cls.__mro__ if cls.__doc__), "").strip().splitlines()
    lines = [
        f"usage: python {script} {{{'|'.join(MODES)}}} [options]",
        "",
        *summary[:1],
        "",
        "commands:",
        *(f"  {mode:<10} {meaning}" for mode, meaning in MODES.items()),
        "",
        "general options:",
        *_option_lines(RootOptions(), ""),
        "",
        "environment options, with or without the prefix env. (--group_size 8 or --env.group_size 8):",
        *_option_lines(env_config, ""),
        "",
        "inference server options:",
        *_option_lines(shown_server, "openai."),
        "",
        "Values: --name value or --name=value; lists take several words; None means absent. Flags win over --config FILE,",
        "the file over the environment's own defaults. The file has sections env: and openai:, see --dry-run.",
        "",
        "examples:",
        f"  python {script} serve --rollout_server_url http://localhost:8000 --openai.base_url http://localhost:9001/v1",
        f"  python {script} process --total_steps 10 --data_path_to_save_groups groups.jsonl --openai.base_url http://localhost:9001/v1",
        f"  python {script} evaluate --data_dir_to_save_evals evals --openai.base_url http://localhost:9001/v1",
        f"  python {script} serve --config env.yaml --group_size 16 --dry-run",
    ]
    return "\n".join(lines)


def _option_lines(model: BaseModel, prefix: str) -> list[str]:
    lines = []
    for name, info in type(model).model_fields.items():
        default = getattr(model, name)
        lines.append(f"  --{prefix}{name} {type_name(info.annotation)}")
        lines.append(f"        {describe(type(model), name)} (default: {default!r})")
    return lines


def _mode_defaults(env_cls: type[BaseEnv], mode: str) -> dict[str, Any]:
    if mode != "process":
        return {}
    path = f"data/{env_cls.name or 'groups'}.jsonl"
    return {"ensure_scores_are_not_same": False, "include_messages": True, "data_path_to_save_groups": path}


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpcore", "openai"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _our_error(error: BaseException) -> AtroposError | None:
    """The first error of ours in a tree of errors; None when a foreign error is there too: then the traceback matters."""
    if isinstance(error, ExceptionGroup):
        found = [_our_error(inner) for inner in error.exceptions]
        return found[0] if all(found) else None
    return error if isinstance(error, AtroposError) else None


def _complain(error: AtroposError) -> None:
    print(f"error: {error}", file=sys.stderr)
    hint = getattr(error, "hint", None)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
