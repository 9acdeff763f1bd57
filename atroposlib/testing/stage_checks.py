"""What the stages of a check showed, as findings: one small function a rule."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atroposlib.envs.base import BaseEnv
from atroposlib.errors import RolloutError
from atroposlib.testing.findings import Finding
from atroposlib.testing.loop_watch import BLOCKED_S

SLOW_SETUP_S = 10.0
TOKEN_ROUTE = "/inference/v1/generate"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def stage_failed(stage: str, error: BaseException, file: Path, deadline_s: float) -> Finding:
    """The finding of a stage that raised, at the author's line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f"{file.name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    if isinstance(error, TimeoutError) and not frames:
        return Finding(
            f"{stage}_runs", "error", f"{stage} did not end within {deadline_s:g} s",
            "see what it waits for; a loop that waits for a right answer never ends with the mock's (--deadline changes the limit)",
        )  # fmt: skip
    return Finding(f"{stage}_runs", "error", f"{stage} raised {type(error).__name__}: {error}", _hint(error), where)


def _hint(error: BaseException) -> str:
    if isinstance(error, NotImplementedError):
        return "define the method that the message names"
    if isinstance(error, RolloutError):
        return "rollouts fail against a server that is well: see the message"
    if isinstance(error, (ConnectionError, OSError)):
        return "it needs something outside: a network, a file, a service; check that it is there"
    if isinstance(error, AttributeError) and "NoneType" in str(error):
        return "something is None: is tokenizer_name set, and does setup() load what is used here?"
    return "mend that line; `python FILE process` shows the whole traceback"


def name_is_set(env_cls: type[BaseEnv]) -> list[Finding]:
    """The environment has a name of its own."""
    if env_cls.name is not None:
        return []
    fix = f'add `name = "{env_cls.__name__.lower()}"` to the class'
    return [Finding("name_is_set", "info", "the environment has no name: metrics and files use the class's", fix)]


def evaluation_exists(env_cls: type[BaseEnv]) -> list[Finding]:
    """The policy can be measured."""
    if env_cls.evaluate is not BaseEnv.evaluate:
        return []
    fix = "define evaluate(): sample held-out items with split='eval' and hand the mean reward to evaluate_log"
    return [Finding("evaluation_exists", "warning", "evaluate() is not defined: nothing measures the policy", fix)]


def setup_is_quick(seconds: float) -> list[Finding]:
    """Starting does not take long."""
    if seconds <= SLOW_SETUP_S:
        return []
    fix = "cache what it downloads or computes; the run waits for it at every start"
    return [Finding("setup_is_quick", "warning", f"setup took {seconds:.1f} s", fix)]


def loop_is_free(blocked: Mapping[str, float]) -> list[Finding]:
    """Nothing blocks the event loop."""
    fix = "await it, or run it elsewhere: `await asyncio.to_thread(function, ...)`; every other rollout waits meanwhile"
    return [
        Finding(
            "loop_is_free", "warning", f"blocked the event loop for {seconds:.1f} s (limit {BLOCKED_S} s)", fix, where
        )
        for where, seconds in blocked.items()
    ]


def items_come(found: int, wanted: int) -> list[Finding]:
    """get_next_item gives items."""
    if found == 0:
        fix = "return an item; None means that there is nothing now, and a run would wait"
        return [Finding("items_come", "error", "get_next_item returned None at once", fix)]
    if found < wanted:
        fix = "start over when the data is used up, unless the run shall end then"
        return [Finding("items_come", "info", f"get_next_item returned None after {found} items", fix)]
    return []


def order_is_repeatable(items: Sequence[Any], again: Sequence[Any]) -> list[Finding]:
    """The same seed gives the same items."""
    if len(items) == len(again) and all(_same(one, other) for one, other in zip(items, again, strict=True)):
        return []
    return [
        Finding(
            "order_is_repeatable", "warning", "two environments with the same seed give different items",
            "draw from random.Random(self.config.seed), made in setup(), not from the random module itself",
        )
    ]  # fmt: skip


def result_form(result: Any) -> list[Finding]:
    """collect_trajectories returns (group, backlog)."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], (list, tuple)):
        return []
    if isinstance(result, tuple) and len(result) == 2:
        found, severity = f"a backlog of type {type(result[1]).__name__}", "error"
    elif isinstance(result, tuple):
        found, severity = f"a tuple of {len(result)}", "error"
    else:
        found, severity = f"a {type(result).__name__} without a backlog", "info"
    fix = "return (group, []); the list holds items to roll out later"
    return [Finding("result_form", severity, f"collect_trajectories returned {found}", fix)]  # type: ignore[arg-type]


def groups_come(groups: int, items: int) -> list[Finding]:
    """Rollouts give groups."""
    if groups or not items:
        return []
    fix = "return a group for every item that can be rolled out; give the mock replies that the environment understands"
    return [Finding("groups_come", "warning", f"none of {items} items gave a group", fix)]


def server_type_fits(servers: Any, routes: Mapping[str, int]) -> list[Finding]:
    """Servers of config_init can do what the rollouts ask for."""
    first = servers[0] if isinstance(servers, list) else servers
    if first.server_type != "openai" or not routes.get(TOKEN_ROUTE):
        return []
    return [
        Finding(
            "server_type_fits", "info", "rollouts need token ids, but config_init names a server of type 'openai'",
            "set server_type='vllm' in config_init, or start with --openai.server_type vllm",
        )
    ]  # fmt: skip


def outage_is_no_reward(result: Any) -> list[Finding]:
    """A group that was made while every request failed."""
    outcome = result[0] if isinstance(result, tuple) else result
    if not outcome:
        return []
    return [
        Finding(
            "outage_is_no_reward", "error",
            "while the inference server refused every request, the environment still returned a group: an outage becomes a reward",
            "let the error of the request pass through; do not turn it into an empty reply or a score of 0",
        )
    ]  # fmt: skip


def _same(one: Any, other: Any) -> bool:
    try:
        if bool(one == other):
            return True
    except (ValueError, TypeError):
        # Arrays compare element by element.
        pass
    return _ADDRESS.sub("", repr(one)) == _ADDRESS.sub("", repr(other))
