"""TeachingEnv: the teacher protocol on problems, and with prompts, that small models can handle."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from atroposlib.data.config import DataConfig
from atroposlib.envs.base import APIServerConfig
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.env import TeacherEnv

SAMPLE = Path(__file__).parent / "data" / "problems.jsonl"
MODEL = "models/SmolLM2-135M-Instruct"

DIAGNOSTIC = """{question}
Do not solve it yet. Say in one sentence what you would do."""
ADAPTIVE = """A student says: {approach}
Problem: Ann has 9 cards and loses 4. How many cards are left?
Calculation: 9 - 4
Problem: Tom buys 3 bags with 2 nuts in each. How many nuts does Tom buy?
Calculation: 3 * 2
Problem: A box holds 7 keys and another one holds 5 keys. How many keys are there in all?
Calculation: 7 + 5
Problem: {question}
Calculation:"""
WITH_TEACHING = """{question}
Your teacher says: {teaching}
Give the answer as a number."""
BASELINE = """{question}
Give the answer as a number."""


class TeachingConfig(TeacherEnvConfig):
    """The protocol's options, set for small models: short prompts without tags, short answers."""

    group_size: int = Field(default=8, ge=2)
    max_token_length: int = 512
    tokenizer_name: str | None = MODEL
    data: DataConfig = DataConfig(dataset_path=SAMPLE, eval_split_ratio=0.2, eval_split_method="hash")
    max_prompt_length: int = Field(default=384, ge=1)
    max_completion_length: int = Field(default=48, ge=1)
    max_probe_tokens: int = Field(default=32, ge=1)
    max_guidance_tokens: int | None = Field(default=10, ge=10)
    temperature: float = Field(default=0.8, gt=0)
    student_samples_per_guidance: int = Field(default=2, ge=1)
    student_diagnostic_template: str | None = DIAGNOSTIC
    teacher_adaptive_template: str | None = ADAPTIVE
    student_with_teaching_template: str | None = WITH_TEACHING
    student_baseline_template: str | None = BASELINE


class TeachingEnv(TeacherEnv):
    """Hints for a frozen student that solves short word problems."""

    name = "teaching"
    env_config_cls = TeachingConfig

    @classmethod
    def config_init(cls) -> tuple[TeachingConfig, list[APIServerConfig]]:
        """The policy, which teaches, on one vLLM server of this machine."""
        return TeachingConfig(), [
            APIServerConfig(base_url="http://localhost:9001/v1", model_name="smollm2-135m", server_type="vllm")
        ]

    @classmethod
    def student_config_init(cls) -> list[APIServerConfig]:
        """The student on another: it needs no token ids, so any OpenAI-compatible server will do."""
        return [APIServerConfig(base_url="http://localhost:9002/v1", model_name="student")]
