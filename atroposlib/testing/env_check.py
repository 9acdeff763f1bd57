"""check_env: run an environment against the mock inference server, and say what is wrong with it and how to mend it."""

from __future__ import annotations

import asyncio
import inspect
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_pools import build_env, pools_of
from atroposlib.testing.env_loading import load_env_class
from atroposlib.testing.findings import CheckReport, EnvCheckError, Finding
from atroposlib.testing.group_checks import Expected, check_group, completions_differ, scores_differ
from atroposlib.testing.loop_watch import LoopWatch
from atroposlib.testing.mock.behaviour import FaultRates
from atroposlib.testing.mock.policies import Policy, Reply
from atroposlib.testing.mock_inference import MockInferenceServer, in_thread
from atroposlib.testing.stage_checks import (
    SLOW_SETUP_S,
    evaluation_exists,
    groups_come,
    items_come,
    loop_is_free,
    name_is_set,
    order_is_repeatable,
    outage_is_no_reward,
    result_form,
    server_type_fits,
    setup_is_quick,
    stage_failed,
)

OUTAGE_DEADLINE_S = 20.0
OUTAGE_TIMEOUT_S = 0.3
"""Of each request: no retry will help."""


@dataclass(frozen=True)
class CheckOptions:
    """How thorough a check is."""

    n_items: int = 4
    config: Mapping[str, Any] = field(default_factory=dict)
    """Values over those of config_init."""
    tokenizer_name: str | None = None
    """None: bytes, which needs no download but makes sequences several times as long."""
    deadline_s: float = 60.0
    """Of each stage."""
    runs_evaluate: bool = True
    stages_outage: bool = True
    """Whether the inference server fails at the end, to see what becomes of it; takes some seconds."""


async def check_env(
    env: type[BaseEnv] | Path | str,
    *,
    reply: Policy | Reply | str | Sequence[str] | None = None,
    class_name: str | None = None,
    **options: Any,
) -> CheckReport:
    """Run config_init, the constructor, setup, get_next_item, a few rollouts and evaluate, with no model and no rollout server.

    Args:
        env: the class, or its file.
        reply: what the mock answers, as MockInferenceServer takes it; None: random words.
        class_name: which class of the file.
        options: fields of CheckOptions.
    Raises:
        ConfigError: there is no such file or class.
    """
    env_cls = load_env_class(Path(env), class_name) if isinstance(env, (str, Path)) else env
    with (
        tempfile.TemporaryDirectory(prefix="atropos-check-") as folder,
        in_thread(MockInferenceServer(reply)) as mock,
    ):
        check = _Check(env_cls, CheckOptions(**options), mock, Path(folder))
        try:
            await check.run()
        except _StopCheck:
            # The finding that stopped it is in the report.
            pass
        finally:
            await check.close()
    return check.report


class _StopCheck(Exception):  # noqa: N818 - it ends the check, the error is in the report
    """What comes next needs what just failed."""


class _Check:
    """One run of the checks; each stage adds its findings to the report."""

    def __init__(self, env_cls: type[BaseEnv], options: CheckOptions, mock: MockInferenceServer, folder: Path) -> None:
        self.env_cls = env_cls
        self.options = options
        self.mock = mock
        self.folder = folder
        self.file = Path(inspect.getsourcefile(env_cls) or "")
        self.report = CheckReport(env_cls.name or env_cls.__name__)
        self._envs: list[BaseEnv] = []

    async def run(self) -> None:
        """All stages, in order."""
        env = await self._build()
        self.report.add(*name_is_set(self.env_cls), *evaluation_exists(self.env_cls))
        async with LoopWatch(self.file) as watch:
            async with self._stage("setup"):
                await env.setup()
            items = await self._draw(env, "get_next_item")
            groups = await self._collect(env, items)
            self.report.add(*scores_differ(groups), *completions_differ(groups))
            await self._evaluate(env)
        self.report.add(*setup_is_quick(self.report.seconds["setup"]), *loop_is_free(watch.blocked))
        self.report.add(*server_type_fits(self._own_servers, self.mock.routes))
        await self._draw_again(items)
        if self.options.stages_outage:
            await self._survive_an_outage(env, items)

    async def close(self) -> None:
        """Close the connections of every environment that was built."""
        for env in self._envs:
            await env.aclose()

    async def _build(self) -> BaseEnv:
        async with self._stage("config_init"):
            config, self._own_servers = self.env_cls.config_init()
            self._config = type(config).model_validate({**config.model_dump(), **self._overrides(config)})
        return await self._construct()

    async def _construct(self) -> BaseEnv:
        async with self._stage("constructor"):
            env = self._new_env()
            self._envs.append(env)
        return env

    def _new_env(self) -> BaseEnv:
        servers = self._servers(self._own_servers)
        pool = self._servers([APIServerConfig(tokenizer_name=self._config.tokenizer_name or "none", timeout=5)])
        return build_env(self.env_cls, self._config, servers, dict.fromkeys(pools_of(self.env_cls), pool))

    def _overrides(self, config: Any) -> dict[str, Any]:
        quiet = {
            "use_wandb": False,
            "run_dir": None,
            "data_path_to_save_groups": None,
            "data_dir_to_save_evals": str(self.folder / "evals"),
        }
        if config.tokenizer_name is not None:
            quiet["tokenizer_name"] = self.options.tokenizer_name or _byte_tokenizer(self.folder)
        return {**quiet, **self.options.config}

    def _servers(self, wanted: Any) -> list[APIServerConfig]:
        """As many as are wanted, every one of them the mock."""
        own = wanted if isinstance(wanted, list) else [wanted]
        mine = {"base_url": self.mock.url, "server_type": "vllm", "model_name": "mock", "api_key": "mock"}
        return [APIServerConfig.model_validate({**server.model_dump(), **mine}) for server in own]

    async def _draw(self, env: BaseEnv, stage: str) -> list[Any]:
        items: list[Any] = []
        async with self._stage(stage):
            for _ in range(self.options.n_items):
                item = await env.get_next_item()
                if item is None:
                    break
                items.append(item)
        self.report.add(*items_come(len(items), self.options.n_items))
        if not items:
            raise _StopCheck
        return items

    async def _collect(self, env: BaseEnv, items: Sequence[Any]) -> list[Any]:
        groups: list[Any] = []
        expected = self._expected(env)
        for item in items:
            async with self._stage("collect_trajectories"):
                result = await env.collect_trajectories(item)
                self.report.add(*result_form(result))
                outcome = result[0] if isinstance(result, tuple) else result
                outcome = await env.postprocess_histories(outcome) if outcome else None
                await env.cleanup()
            self.report.items += 1
            found = [group for group in (outcome if isinstance(outcome, list) else [outcome]) if group is not None]
            for group in found:
                findings = check_group(group, expected)
                self.report.add(*findings)
                if not any(finding.check == "group_form" for finding in findings):
                    groups.append(group)
            self.report.groups += len(found)
        self.report.sequences = sum(len(group["tokens"]) for group in groups)
        self.report.add(*groups_come(self.report.groups, len(items)))
        return groups

    def _expected(self, env: BaseEnv) -> Expected:
        is_models_own = self.options.tokenizer_name is not None
        return Expected(
            group_size=env.config.group_size,
            vocab_size=len(env.tokenizer) if env.tokenizer is not None else None,
            max_token_length=env.config.max_token_length if is_models_own else None,
        )

    async def _evaluate(self, env: BaseEnv) -> None:
        if not self.options.runs_evaluate or self.env_cls.evaluate is BaseEnv.evaluate:
            return
        async with self._stage("evaluate"):
            await env.evaluate()
            self.report.is_evaluated = True

    async def _draw_again(self, items: Sequence[Any]) -> None:
        """The same seed again gives the same items; not tried where setup takes long."""
        if self.report.seconds["setup"] > SLOW_SETUP_S:
            return
        again = await self._construct()
        async with self._stage("setup"):
            await again.setup()
        repeated = await self._draw(again, "get_next_item")
        self.report.add(*order_is_repeatable(items, repeated))

    async def _survive_an_outage(self, env: BaseEnv, items: Sequence[Any]) -> None:
        """A dead inference server must not become a reward."""
        self.mock.fault_rates = FaultRates(refuse=1.0)
        for server in env.server.servers:
            # A fraction, though configs hold whole seconds.
            server.config.timeout = OUTAGE_TIMEOUT_S  # type: ignore[assignment]
        asked = self.mock.routes.total()
        try:
            async with asyncio.timeout(OUTAGE_DEADLINE_S):
                result = await env.collect_trajectories(items[0])
        except (Exception, ExceptionGroup):
            # As it should be: the group is dropped. Which error it is, is the environment's affair.
            return
        if self.mock.routes.total() > asked:
            self.report.add(*outage_is_no_reward(result))

    @asynccontextmanager
    async def _stage(self, name: str) -> AsyncIterator[None]:
        """A part of the environment: an error in it becomes a finding and ends the check."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.options.deadline_s):
                yield
        except TimeoutError as error:
            self.report.add(stage_failed(name, error, self.file, self.options.deadline_s))
            raise _StopCheck from error
        except Exception as error:
            self.report.add(stage_failed(name, error, self.file, self.options.deadline_s))
            raise _StopCheck from error
        finally:
            self.report.seconds.setdefault(name, round(time.monotonic() - started, 3))
            # Here and not at the end: the outage's requests are none of the environment's.
            totals = self.mock.totals
            self.report.requests = sum(totals[name] for name in list(totals) if name.startswith("finished/"))


def _byte_tokenizer(folder: Path) -> str:
    from atroposlib.testing.byte_tokenizer import save_byte_tokenizer

    place = folder / "tokenizer"
    return str(place) if place.exists() else save_byte_tokenizer(place)


__all__ = ["CheckOptions", "CheckReport", "EnvCheckError", "Finding", "check_env"]
