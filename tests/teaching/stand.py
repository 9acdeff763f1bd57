"""A TeacherEnv between two mock servers: one is the policy, which teaches, the other the student."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from atroposlib.data.config import DataConfig
from atroposlib.envs.base import APIServerConfig
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.env import TeacherEnv
from atroposlib.teaching.episode import TeachingItem
from atroposlib.testing.mock.policies import Prompt, PromptFunction
from atroposlib.testing.mock_inference import MockInferenceServer

PROBE, TEACH, TAUGHT, BASELINE = "PROBE", "TEACH", "TAUGHT", "BASELINE"
TEMPLATES = {
    "student_diagnostic_template": PROBE + " {question}",
    "teacher_adaptive_template": TEACH + " {question} | {approach}",
    "student_with_teaching_template": TAUGHT + " {question} | {teaching}",
    "student_baseline_template": BASELINE + " {question}",
}
ITEM = TeachingItem("What is 20 + 22?", "42", "q1")
GOOD, BAD = "Add the tens first.", "Guess."


def student_replies(*, unaided: str = "41", taught: Callable[[str], str] | None = None) -> PromptFunction:
    """Right with GOOD guidance; `unaided` is what it says without."""

    def reply(prompt: Prompt) -> str:
        asked = prompt.last_user_text
        if asked.startswith(PROBE):
            return "First add 20 and 22."
        if asked.startswith(BASELINE):
            return f"The answer is {unaided}"
        teaching = asked.partition(" | ")[2].strip()
        return taught(teaching) if taught else f"The answer is {42 if teaching == GOOD else 41}"

    return PromptFunction(reply)


def teacher_replies(*texts: str) -> PromptFunction:
    """The texts by turns over the members of a group."""
    return PromptFunction(lambda prompt: texts[prompt.index % len(texts)])


class TeachingStand:
    """The servers, and environments between them.

    Args:
        settings: options of every environment.
    """

    def __init__(self, tokenizer_name: str, **settings: Any) -> None:
        self.teacher = MockInferenceServer(teacher_replies(f"<teaching>{GOOD}</teaching>", BAD))
        self.student = MockInferenceServer(student_replies())
        self.reference = MockInferenceServer(teacher_replies(BAD))
        self.timeout_s = 20
        """Of a request, its repetitions included."""
        self.settings = {
            "tokenizer_name": tokenizer_name,
            "group_size": 4,
            "num_baseline_samples": 2,
            "max_token_length": 4096,
            "max_prompt_length": 1024,
            "max_completion_length": 256,
            "max_probe_tokens": 64,
            "use_wandb": False,
            **TEMPLATES,
            **settings,
        }

    def config(self, **settings: Any) -> TeacherEnvConfig:
        return TeacherEnvConfig.model_validate({**self.settings, **settings})

    @asynccontextmanager
    async def env(self, **settings: Any) -> AsyncIterator[TeacherEnv]:
        async with AsyncExitStack() as stack:
            for server in (self.teacher, self.student, self.reference):
                await stack.enter_async_context(server)
            policy_at = [APIServerConfig(base_url=self.teacher.url, server_type="vllm", timeout=self.timeout_s)]
            student_at = [APIServerConfig(base_url=self.student.url, model_name="student", timeout=self.timeout_s)]
            is_compared = settings.get("use_reference_teacher_model", False)
            env = TeacherEnv(
                self.config(**settings),
                policy_at,
                student_server_configs=student_at,
                reference_server_configs=[APIServerConfig(base_url=self.reference.url)] if is_compared else None,
            )
            stack.push_async_callback(env.aclose)
            yield env

    @property
    def asked(self) -> list[str]:
        """Kind of each request that the student got, by the first word of its prompt."""
        return [request["messages"][-1]["content"].split()[0] for request in self.student.requests]


def a_data_set(folder: Path, n: int = 10) -> DataConfig:
    """Sums whose answers the student knows only with GOOD guidance, and only where it is 42."""
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"What is {i} + {42 - i}?", "ground_truth": "42"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(dataset_path=path, eval_split_ratio=0.4)
