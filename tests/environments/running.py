"""Runs a whole environment against the mock inference server: process, evaluate, serve with a trainer of one batch, check_env."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from atroposlib.client import RolloutClient
from atroposlib.envs.base import APIServerConfig, BaseEnv
from atroposlib.envs.processing.process import process
from atroposlib.envs.serving.serve import serve
from atroposlib.testing import check_env
from atroposlib.testing.mock.policies import Policy, Prompt, PromptFunction
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.wire.columns import Group
from atroposlib.wire.models import RunRequest
from tests.processes import RolloutServerProcess


def alternating(right: Callable[[str], str], wrong: Callable[[str], str]) -> PromptFunction:
    """Choices 0, 2, ... of a group answer right, the others wrong; both are told what the user said last."""

    def reply(prompt: Prompt) -> str:
        return (wrong if prompt.index % 2 else right)(prompt.last_user_text.strip())

    return PromptFunction(reply)


def lines_of(path: Path, *, whole: bool = False) -> list[Any]:
    """JSON of each line, or of the whole file."""
    text = path.read_text()
    return [json.loads(part) for part in ([text] if whole else text.splitlines())]


class Stand:
    """An environment class with a mock that answers as `policy` does.

    Args:
        settings: options of the environment, for every run.
    """

    def __init__(self, env_cls: type[BaseEnv], policy: Policy, tokenizer_name: str, **settings: Any) -> None:
        self.env_cls, self.policy = env_cls, policy
        self.checked: type[BaseEnv] | Path = env_cls
        """What check_env gets: the class, or its file as `atropos check` does."""
        self.inference_url: str | None = None
        """Of another server than the mock."""
        self.settings = {"tokenizer_name": tokenizer_name, "use_wandb": False, **settings}

    async def env(self, stack: AsyncExitStack, **settings: Any) -> BaseEnv:
        """A fresh one with a mock of its own; both end with the stack."""
        self.mock = MockInferenceServer(self.policy)
        url = self.inference_url or (await stack.enter_async_context(self.mock)).url
        config, _ = self.env_cls.config_init()
        config = type(config).model_validate({**config.model_dump(), **self.settings, **settings})
        env = self.env_cls(config, [APIServerConfig(base_url=url, server_type="vllm")])
        stack.push_async_callback(env.aclose)
        return env

    async def processed(self, path: Path, *, groups: int = 2) -> list[dict[str, Any]]:
        """Groups that process writes."""
        async with AsyncExitStack() as stack:
            env = await self.env(stack, total_steps=groups, max_num_workers=1)
            await process(env, path)
        return lines_of(path)

    async def evaluated(self, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics and samples that evaluate leaves."""
        async with AsyncExitStack() as stack:
            env = await self.env(stack, data_dir_to_save_evals=str(folder))
            await env.setup()
            await env.evaluate()
        # The token route has them apart, the chat route at the top.
        temperatures = {request.get("sampling_params", request)["temperature"] for request in self.mock.requests}
        assert temperatures == {0.0}, "evaluation is greedy"
        [report] = lines_of(folder / "metrics.json", whole=True)
        assert float(report["config_general"]["total_evaluation_time_seconds"]) > 0
        return report["results"]["all"], lines_of(folder / "samples.jsonl")

    async def leased(self, server: RolloutServerProcess, folder: Path, *, batch_size: int = 4) -> list[Group]:
        """The one batch that a trainer leases while the environment serves."""
        async with AsyncExitStack() as stack:
            env = await self.env(stack, rollout_server_url=server.url, run_dir=str(folder))
            trainer = await stack.enter_async_context(RolloutClient(server.url))
            async with asyncio.timeout(15), asyncio.TaskGroup() as tasks:
                request = RunRequest(run_name="r", batch_size=batch_size, max_staleness=1, num_steps=1)
                run = await trainer.open_run(request)
                await trainer.publish_policy(0, session=run.session)
                tasks.create_task(serve(env))
                batch = await trainer.lease(0, session=run.session, deadline_s=12)
                await trainer.ack(0, session=run.session, policy_version=1)
        return batch

    async def check(self) -> list[str]:
        """Names of the warnings of check_env; raises for errors."""
        settings = {name: value for name, value in self.settings.items() if name != "tokenizer_name"}
        report = await check_env(self.checked, reply=self.policy, n_items=2, config=settings)
        report.raise_for_errors()
        return [finding.check for finding in report.warnings]
