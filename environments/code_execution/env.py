"""Write a Python function that passes tests. The tests' expected results never enter the sandbox that runs the code."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup
from atroposlib.errors import ConfigError
from environments.code_execution.sandbox import Execution, Limits, execute
from environments.rows import held_out, load_rows, shuffled_forever

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent / "data" / "tasks.jsonl"
FIELDS = {"task": str, "function": str, "tests": list}
SYSTEM = "Solve the task with the standard library of Python only. Answer with one code block:\n```python\n...\n```"
CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
SHOWN_TESTS = 2
"""Tests that the model is told; the others are hidden."""


class CodeExecutionConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 8
    max_token_length: int = 1536
    tokenizer_name: str | None = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    source: str | None = Field(default=None, description="JSONL file or hub id; None: the sample that comes along.")
    eval_share: float = Field(default=0.2, gt=0, lt=1, description="Part of the tasks to hold out.")
    eval_size: int = Field(default=200, ge=1, description="Held-out tasks, at most.")
    max_tokens: int = Field(default=1024, ge=1, description="Tokens of the longest reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")
    reward: Literal["all", "share"] = Field(
        default="all", description="all: 1 when every test passes, else 0. share: the share of tests that pass."
    )
    sandboxes: int = Field(default=4, ge=1, description="Solutions that run at once; at most one for each CPU is fair.")
    wall_s: float = Field(default=8.0, gt=0, description="Seconds a solution may take for all tests together.")
    cpu_s: int = Field(default=4, ge=1, description="Seconds of CPU time, likewise.")
    memory_mb: int = Field(default=256, ge=64, description="Megabytes of memory, the interpreter's included.")
    needs_isolation: bool = Field(
        default=False, description="Refuse to start unless the kernel offers both namespaces and Landlock."
    )


@dataclass(frozen=True)
class Task:
    """A function to write, and what it must give."""

    task: str
    function: str
    calls: tuple[list[Any], ...]
    expected: tuple[Any, ...]

    @property
    def messages(self) -> list[Message]:
        """What the model is asked."""
        shown = [
            f"{self.function}({', '.join(map(repr, args))}) == {value!r}"
            for args, value in zip(self.calls[:SHOWN_TESTS], self.expected, strict=False)
        ]
        text = f"{self.task}\n\nName the function `{self.function}`. For example:\n" + "\n".join(shown)
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def task_of(row: dict[str, Any]) -> Task:
    """A row as a task.

    Raises:
        ConfigError: the tests are not a list of {"args": [...], "expected": ...}.
    """
    tests = row["tests"]
    if not tests or not all(isinstance(test, dict) and isinstance(test.get("args"), list) for test in tests):
        raise ConfigError(f'task {row["task"][:60]!r}: tests must be a list of {{"args": [...], "expected": ...}}')
    return Task(
        row["task"],
        row["function"],
        tuple(test["args"] for test in tests),
        tuple(test.get("expected") for test in tests),
    )


def extract_code(text: str) -> str | None:
    """The last code block of a reply; None without one."""
    blocks = CODE.findall(text)
    return str(blocks[-1]) if blocks else None


def is_close(expected: float, found: float) -> bool:
    """Equal up to rounding; an integer beyond all floats is close to none."""
    try:
        return math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-9)
    except OverflowError:
        return False


def same(expected: Any, found: Any) -> bool:
    """Whether two JSON values are equal: floats up to rounding, and True is not 1."""
    if isinstance(expected, bool) or isinstance(found, bool):
        return expected is found
    if isinstance(expected, (int, float)) and isinstance(found, (int, float)):
        exact = isinstance(expected, int) and isinstance(found, int)
        return expected == found if exact else is_close(expected, found)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(same, expected, found))
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(same(expected[key], found[key]) for key in expected)
    return type(expected) is type(found) and bool(expected == found)


def passed(task: Task, execution: Execution) -> int:
    """Tests that the execution passes."""
    results = zip(task.expected, execution.outcomes, strict=False)
    return sum(not outcome.error and same(expected, outcome.value) for expected, outcome in results)


class CodeExecutionEnv(BaseEnv):
    """Write a function; the tests decide."""

    name = "code_execution"
    env_config_cls = CodeExecutionConfig

    @classmethod
    def config_init(cls) -> tuple[CodeExecutionConfig, list[APIServerConfig]]:
        """One vLLM server on this machine."""
        config = CodeExecutionConfig()
        server = APIServerConfig(
            base_url="http://localhost:9001/v1", model_name=str(config.tokenizer_name), server_type="vllm"
        )
        return config, [server]

    async def setup(self) -> None:
        """Load the tasks, hold some out, and try the sandbox.

        Raises:
            ConfigError: the tasks are malformed, or the isolation that was asked for cannot be had.
        """
        config = self.config
        train, test = held_out(load_rows(config.source or SAMPLE, fields=FIELDS), config.eval_share, "task")
        self.tasks = shuffled_forever([task_of(row) for row in train], config.seed)
        self.heldout = [task_of(row) for row in test[: config.eval_size]]
        self.limits = Limits(wall_s=config.wall_s, cpu_s=config.cpu_s, memory_bytes=config.memory_mb << 20)
        self.slots = asyncio.Semaphore(config.sandboxes)
        trial = await execute("def f(): return 1", "f", [[]], self.limits)
        if config.needs_isolation and not (trial.has_namespaces and trial.landlock):
            raise ConfigError(
                "needs_isolation: this kernel gives the sandbox "
                f"namespaces={trial.has_namespaces}, landlock={trial.landlock}; see environments/code_execution/README.md"
            )
        if not (trial.has_namespaces or trial.landlock):
            log.warning(
                "this kernel offers neither namespaces nor Landlock: only an audit hook keeps the policy's code from "
                "files and network; run in a container, see environments/code_execution/README.md"
            )

    async def get_next_item(self) -> Task:
        """The next training task."""
        return next(self.tasks)

    async def collect_trajectories(self, item: Task) -> tuple[ScoredDataGroup, list[Task]]:
        """group_size solutions of one task."""
        group = await self.rollout_group(
            item.messages,
            reward=lambda text: self.pay(item, text),
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )
        return group, []

    async def pay(self, task: Task, text: str) -> float:
        """The reward of one reply. What the code does, crashing and never ending included, is the policy's doing.

        Raises:
            SandboxError: the sandbox failed, which says nothing about the reply.
        """
        code = extract_code(text)
        if code is None:
            return 0.0
        async with self.slots:
            execution = await execute(code, task.function, task.calls, self.limits)
        share = passed(task, execution) / len(task.expected)
        return share if self.config.reward == "share" else float(share == 1.0)

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy solutions of the held-out tasks."""
        samples = await self.evaluate_items(self.heldout, self._solve_greedily)
        metrics = {"heldout_reward": fmean(sample["score"] for sample in samples), "heldout_size": len(samples)}
        sampling = {"temperature": 0.0, "max_tokens": self.config.max_tokens}
        await self.evaluate_log(metrics, samples=samples, generation_parameters=sampling)
        return metrics

    async def _solve_greedily(self, task: Task) -> dict[str, Any]:
        [(text, _)] = await self.sample(task.messages, temperature=0.0, max_tokens=self.config.max_tokens, split="eval")
        gold = json.dumps(task.expected)
        return {"question": task.task, "gold_answer": gold, "completion": text, "score": await self.pay(task, text)}
