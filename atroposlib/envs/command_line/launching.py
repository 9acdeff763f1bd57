"""From resolved options to a running environment: what each mode changes, building, running, failing in one line."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TextIO

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.event_loop import run_fast
from atroposlib.envs.command_line.options import Resolved
from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.eval_items import forget_journals
from atroposlib.envs.processing.process import process
from atroposlib.envs.server_pools import build_env
from atroposlib.errors import AtroposError

INTERRUPTED_STATUS = 130


def mode_defaults(env_cls: type[BaseEnv], mode: str, env: BaseEnvConfig) -> dict[str, Any]:
    """What a mode changes in config_init's values; file and flags win over it."""
    changed: dict[str, Any] = {} if env.wandb_name else {"wandb_name": env_cls.name or env_cls.__name__}
    if mode == "serve":
        return changed
    changed["use_wandb"] = True
    if mode == "process":
        changed["ensure_scores_are_not_same"] = False
        changed["include_messages"] = True
        changed["data_path_to_save_groups"] = f"data/{env_cls.name or 'groups'}.jsonl"
    return changed


def launch(env_cls: type[BaseEnv], mode: str, resolved: Resolved) -> None:
    """Build the environment and run the mode to its end. Exits with 1 when it fails, 130 after Ctrl-C.

    Raises:
        ConfigError: the environment refuses its configuration.
    """
    for warning in resolved.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if resolved.root.dry_run:
        print(resolved.as_yaml(), end="")
        return
    _configure_logging(resolved.root.log_level)
    env = build(env_cls, resolved)
    try:
        run_fast(_run(mode, env, resolved))
    except (AtroposError, ExceptionGroup) as error:
        ours = _our_error(error)
        if ours is None:
            raise
        complain(ours)
        _hint_at_resume(mode, resolved)
        sys.exit(1)
    except KeyboardInterrupt:
        _hint_at_resume(mode, resolved)
        sys.exit(INTERRUPTED_STATUS)


def build(env_cls: type[BaseEnv], resolved: Resolved) -> BaseEnv:
    """The environment, with what its constructor has no argument for."""
    root = resolved.root
    env = build_env(env_cls, resolved.env, resolved.servers, resolved.pools, slurm=root.slurm, testing=root.testing)
    manager: Any = env.server
    if "max_n_completions" in root.model_fields_set:
        manager.max_n_completions = root.max_n_completions
    if root.proxy_url is not None:
        manager.proxy_url, manager.use_proxy = root.proxy_url, True
    return env


def complain(error: AtroposError) -> None:
    """An error as one line on stderr, and its hint."""
    print(f"error: {error}", file=sys.stderr)
    hint = getattr(error, "hint", None)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def _run(mode: str, env: BaseEnv, resolved: Resolved) -> Coroutine[Any, Any, None]:
    if mode == "serve":
        return env.env_manager()
    if mode == "process":
        return _process(env, resolved)
    return _evaluate(env, resolved)


async def _process(env: BaseEnv, resolved: Resolved) -> None:
    try:
        summary = await process(env, Path(env.config.data_path_to_save_groups), is_resumed=resolved.root.resume)
    finally:
        await env.aclose()
    print(summary.line())


async def _evaluate(env: BaseEnv, resolved: Resolved) -> None:
    started = time.time()
    folder = Path(env.config.data_dir_to_save_evals) if env.config.data_dir_to_save_evals else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluate_config.yaml").write_text(resolved.as_yaml(), encoding="utf-8")
        if not resolved.root.resume:
            forget_journals(folder)
    try:
        await env.setup()
        returned = await env.evaluate()
        if env.logged_evaluation is None and isinstance(returned, dict):
            await env.evaluate_log(returned, start_time=started)
    finally:
        await env.aclose()
    if folder is not None:
        print(f"evaluation written to {folder}")


def _hint_at_resume(mode: str, resolved: Resolved) -> None:
    if mode != "serve" and not resolved.root.resume:
        print("hint: the same command with --resume goes on with what is finished", file=sys.stderr)


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is now: a progress bar replaces it, to keep itself below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.stream = sys.stderr
        super().emit(record)


def _configure_logging(level: str) -> None:
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, handlers=[_CurrentStderr()])
    for noisy in ("httpx", "httpcore", "openai"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _our_error(error: BaseException) -> AtroposError | None:
    """The first error of ours in a tree of errors; None when a foreign error is there too: then the traceback matters."""
    if isinstance(error, ExceptionGroup):
        found = [_our_error(inner) for inner in error.exceptions]
        return found[0] if all(found) else None
    return error if isinstance(error, AtroposError) else None
