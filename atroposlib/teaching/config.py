"""TeacherEnvConfig: the options of the teacher protocol beside those of every environment."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from atroposlib.data.config import DataConfig
from atroposlib.envs.config import BaseEnvConfig
from atroposlib.rim.config import RIMConfig
from atroposlib.teaching.rewards import LeakPolicy, RewardMode
from atroposlib.teaching.templates import REQUIRED, Template

NESTED = ("max_probe_tokens", *REQUIRED)
"""Options that trainer_args may hold as well."""
DEFAULT_LEAK_CAP = 0.3


class TeacherEnvConfig(BaseEnvConfig):
    """Options of the teacher protocol."""

    # data.db_url may hold a password, and the hiding of the inner model does not reach out here.
    model_config = ConfigDict(hide_input_in_errors=True)

    group_size: int = Field(default=8, ge=2, description="Guidances of one item, scored against each other.")
    max_token_length: int = Field(
        default=6144, ge=1, description="Tokens of the longest trained sequence: teacher prompt and guidance."
    )
    data: DataConfig = Field(default_factory=DataConfig, description="Where the problems come from.")
    rim: RIMConfig | None = Field(default=None, description="The judges, for teaching_reward_mode=rim.")

    student_model: str | None = Field(
        default=None,
        description="Name or folder of the student, which tells its kept baselines apart; None: the --student.model_name.",
    )
    student_tokenizer_name_or_path: str | None = Field(
        default=None, description="Counts the student's tokens where its server does not; None: words are counted then."
    )
    use_reference_teacher_model: bool = Field(
        default=False,
        description="Pay what a guidance is better than one of the reference teacher, the policy before training, at --reference.base_url.",
    )

    max_prompt_length: int = Field(
        default=2048, ge=1, description="Tokens of the teacher's prompt; an item whose prompt is longer is passed over."
    )
    max_completion_length: int = Field(default=4096, ge=1, description="Tokens of one solution of the student.")
    max_probe_tokens: int = Field(default=500, ge=1, description="Tokens of the student's approach.")
    max_guidance_tokens: int | None = Field(
        default=None, ge=10, description="Tokens of one guidance; None: max_completion_length."
    )
    temperature: float = Field(default=1.0, gt=0, description="Of the teacher in training; evaluation is greedy.")
    student_temperature: float = Field(default=0.7, ge=0, description="Of the student in training.")
    student_temperature_eval: float = Field(default=0.0, ge=0, description="Of the student in evaluation.")

    num_baseline_samples: int = Field(default=4, ge=1, description="Unaided attempts at each item; they are kept.")
    student_samples_per_guidance: int = Field(default=1, ge=1, description="Attempts with each guidance.")
    min_student_samples: int = Field(
        default=1, ge=1, description="Attempts, unaided and with a guidance, that must not have failed."
    )
    capability_estimator: Literal["auto", "baseline", "judge", "none"] = Field(
        default="auto",
        description="What says how able the student is: its unaided attempts; the diagnostic judge; auto: the first that can.",
    )

    student_diagnostic_template: str | None = Field(
        default=None, description="Asks the student for its approach; has {question}. None: the built-in one."
    )
    teacher_adaptive_template: str | None = Field(
        default=None, description="Asks the teacher; has {question} and {approach}. None: the built-in one."
    )
    student_with_teaching_template: str | None = Field(
        default=None,
        description="Asks the student with guidance; has {question} and {teaching}. None: the built-in one.",
    )
    student_baseline_template: str | None = Field(
        default=None, description="Asks the student without guidance; has {question}. None: the built-in one."
    )
    trainer_args: dict[str, Any] = Field(
        default={}, description="Older spelling: max_probe_tokens and the templates may stand in here."
    )

    teaching_reward_mode: RewardMode = Field(
        default="asymmetric",
        description="asymmetric: help pays, harm costs more; outcome: by right and wrong; additive: for comparisons only; rim: judges.",
    )
    degradation_penalty_multiplier: float = Field(
        default=2.0, ge=0, description="asymmetric: what a loss of the student's score costs, times the loss."
    )
    efficiency_weight: float = Field(default=1.0, ge=0, description="asymmetric: weight of the bonus for brevity.")
    silence_bonus: float = Field(
        default=0.0, ge=0, description="asymmetric: paid for brevity where the student is right anyway."
    )
    teaching_length_scope: Literal["span", "full"] = Field(
        default="span", description="What counts as length: what the student is shown, or all that the teacher wrote."
    )
    leak_policy: LeakPolicy = Field(
        default="zero",
        description="A guidance that states the answer: zero takes its reward, cap leaves rim.anti_gaming.cap_score (0.3).",
    )

    logging_prob: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the groups that are written in full to episodes.jsonl in run_dir.",
    )

    @model_validator(mode="before")
    @classmethod
    def _nested_spelling(cls, data: Any) -> Any:
        """Options of trainer_args become options; the same with two values is an error."""
        if not isinstance(data, dict) or not data.get("trainer_args"):
            return data
        nested, values = dict(data["trainer_args"]), {**data, "trainer_args": {}}
        for name, value in nested.items():
            if name not in NESTED:
                raise ValueError(f"trainer_args.{name} is none of {', '.join(NESTED)}")
            if values.get(name) not in (None, value):
                raise ValueError(f"trainer_args.{name} and {name} are one option, with two values: give one of them")
            values[name] = value
        return values

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.max_probe_tokens > self.max_completion_length:
            raise ValueError(
                f"max_probe_tokens={self.max_probe_tokens} must not exceed max_completion_length={self.max_completion_length}"
            )
        longest = self.max_prompt_length + self.guidance_tokens
        if longest > self.max_token_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} and {self.guidance_tokens} tokens of guidance are {longest} tokens, "
                f"more than max_token_length={self.max_token_length}: raise it, or lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_there(self) -> Self:
        if self.teaching_reward_mode == "rim" and self.rim is None:
            raise ValueError("teaching_reward_mode=rim needs judges: give rim, e.g. {models: {small_model: ...}}")
        if self.capability_estimator == "judge" and self.rim is None:
            raise ValueError("capability_estimator=judge needs judges: give rim, e.g. {models: {small_model: ...}}")
        if self.student_samples_per_guidance < self.min_student_samples:
            raise ValueError(
                f"min_student_samples={self.min_student_samples} is more than "
                f"student_samples_per_guidance={self.student_samples_per_guidance}"
            )
        if self.num_baseline_samples < self.min_student_samples:
            raise ValueError(
                f"min_student_samples={self.min_student_samples} is more than num_baseline_samples={self.num_baseline_samples}"
            )
        return self

    @property
    def guidance_tokens(self) -> int:
        """Tokens of one guidance."""
        return self.max_guidance_tokens or self.max_completion_length

    @property
    def leak_cap(self) -> float:
        """leak_policy=cap: what a reward is held down to."""
        return self.rim.anti_gaming.cap_score if self.rim is not None else DEFAULT_LEAK_CAP

    def template(self, name: str) -> Template:
        """The template of an option.

        Raises:
            ConfigError: it lacks a variable.
        """
        return Template.of(name, getattr(self, name))
