"""RIMConfig: which judges are asked, how often, and what is made of their answers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from atroposlib.errors import ConfigError

JudgeName = Literal["accuracy", "helpfulness", "process", "diagnostic"]
Share = Annotated[float, Field(ge=0, le=1)]
Price = Annotated[float, Field(ge=0)]
REWARD_NAMES = ("rim", "RIMReward", "RIM.reward_adapter.RIMReward", "atlas_core.reward.interpretation.RIMReward")
"""What `teacher_reward._target_` may say."""

ALL_JUDGES: tuple[JudgeName, ...] = ("accuracy", "helpfulness", "process", "diagnostic")
TEACHING: tuple[JudgeName, ...] = ("helpfulness", "process")
PRESETS: dict[str, tuple[JudgeName, ...]] = {
    "runtime": ALL_JUDGES,
    "interpretation": ALL_JUDGES,
    "offline": TEACHING,
    "interpretation_offline": TEACHING,
    "interpretation_teaching": TEACHING,
    "rim_teaching": TEACHING,
}
"""Judges of each preset, in their usual order."""
DEFAULT_PRESET = "offline"


def _known_preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"no RIM preset {name!r}; known: {', '.join(PRESETS)}")
    return name


_HIDDEN = "***"


def _hide_a_key(value: Any) -> Any:
    """Errors show what was given, in whoever's config this one stands; a key must not get that far."""
    return value if isinstance(value, str) and re.fullmatch(r"env:[A-Za-z_]\w*", value) else _HIDDEN


def _refuse_a_key(value: str) -> str:
    if value == _HIDDEN:
        raise ValueError(
            "name the variable that holds the key, e.g. env:GEMINI_API_KEY; keys do not belong into configs"
        )
    return value


# The outer one runs first.
KeyVariable = Annotated[str, AfterValidator(_refuse_a_key), BeforeValidator(_hide_a_key)]


class Section(BaseModel):
    """A part of the config: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )


class Models(Section):
    """The models that judge: `provider/model` as litellm writes it, or `http://host:port/v1#model`."""

    small_model: str = Field(min_length=1)
    """Asked first, once for each temperature."""
    large_model: str | None = None
    """Decides where the small one is unsure or disagrees with itself. None: the judge abstains there."""


class ModelConfig(Section):
    """How one of the models is asked."""

    max_tokens: int = Field(default=32768, ge=1)
    """Tokens of one answer, its reasoning included; a local server with a short context needs fewer."""
    response_format: Literal["json", "text"] = "json"
    """json: ask the server for a JSON object. text: for servers that know no such option."""
    base_url: str | None = Field(default=None, pattern=r"^https?://")
    """OpenAI-compatible base URL, up to and with /v1. None: that of the provider in the model's name."""
    api_key: KeyVariable | None = None
    """env:NAME, the variable that holds the key. None: the provider's own variable; none for a local server."""
    prompt_price: Price | None = None
    """Of a million prompt tokens, in the currency that rim/cost is to have. None: no cost is logged."""
    completion_price: Price | None = None
    """Of a million completion tokens."""

    @model_validator(mode="after")
    def _both_prices_or_none(self) -> Self:
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("prompt_price and completion_price belong together: give both, 0 where it costs nothing")
        return self

    @property
    def is_priced(self) -> bool:
        """Whether its prices are known."""
        return self.prompt_price is not None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What a call costs; 0 where no prices are given."""
        of_prompt, of_completion = self.prompt_price or 0.0, self.completion_price or 0.0
        return (prompt_tokens * of_prompt + completion_tokens * of_completion) / 1e6


class ModelConfigs(Section):
    """Of the small model (default) and the large one."""

    default: ModelConfig = ModelConfig()
    large: ModelConfig = ModelConfig()

    def of(self, *, is_large: bool) -> ModelConfig:
        """The one that a call concerns."""
        return self.large if is_large else self.default


class ConsistencyRules(Section):
    """Bounds between the scores of judges that both answered. None switches a rule off."""

    alignment_completeness_bound: Share | None = 0.1
    """process <= accuracy + this."""
    completeness_helpfulness_threshold: Share | None = 0.5
    """If process is below this, helpfulness is at most this."""
    understanding_helpfulness_bound: Share | None = 0.1
    """helpfulness <= diagnostic + this."""
    order: tuple[
        Literal[
            "alignment_completeness_bound", "completeness_helpfulness_threshold", "understanding_helpfulness_bound"
        ],
        ...,
    ] = ("alignment_completeness_bound", "completeness_helpfulness_threshold", "understanding_helpfulness_bound")
    """Each rule sees what the ones before it left."""

    @model_validator(mode="before")
    @classmethod
    def _penalties_are_read_by_nobody(cls, data: Any) -> Any:
        unused = sorted(
            {"contradiction_penalty", "safety_violation_penalty"} & set(data if isinstance(data, dict) else ())
        )
        if unused:
            raise ValueError(
                f"consistency_rules.{unused[0]} has never had an effect: no rule defines it. Remove it; to punish unsafe or "
                "contradictory text, say so in constitution_principles"
            )
        return data


class AntiGaming(Section):
    """A reward is held down where the trained text works on the judge instead of on the task."""

    enabled: bool = True
    cap_score: Share = 0.3
    """Largest reward when a detector fires."""
    detect_instructions_to_judge: bool = True
    """Text that tells a grader what to do."""
    detect_empty_or_repeated: bool = True
    """No text at all, or one that says the same few words again and again."""
    detect_answer_leak: bool = True
    """Guidance that contains the ground truth, which neither the question nor the student's plan does."""
    detect_judge_format: bool = True
    """JSON with a "score" in it."""
    max_chars: int | None = Field(default=None, ge=1)
    """Characters of the trained text beyond which it is too long. None: no limit."""


class ParallelExecution(Section):
    """How much of one call runs at once."""

    max_workers: int = Field(default=8, ge=1)
    """Judge calls in flight for one call of `score`."""


class TeacherReward(Section):
    """The documented way to name the reward."""

    target: str = Field(default="rim", alias="_target_")
    """rim, or the dotted name of RIMReward."""
    student_model: None = None
    """Always null: models live behind servers."""
    teacher_model: None = None
    """Always null: models live behind servers."""
    tokenizer: None = None
    """Always null: judges read text."""

    @model_validator(mode="after")
    def _is_this_reward(self) -> Self:
        if self.target not in REWARD_NAMES:
            raise ValueError(f"teacher_reward._target_ is {self.target!r}; known: {', '.join(REWARD_NAMES)}")
        return self


class Breaker(Section):
    """Stops scoring when judges fail too often, instead of training on what is left."""

    max_abstain_share: Share = 0.3
    """Share of the last `window` judgements without a score above which scoring stops."""
    window: int = Field(default=100, ge=1)
    """Judgements that are looked at; fewer never stop it."""
    pause_s: float = Field(default=60.0, gt=0)
    """Seconds until the judges are tried again."""


class RIMConfig(Section):
    """The reward interpretation model."""

    preset: Annotated[str, AfterValidator(_known_preset)] | None = None
    """Whose judges are active where active_judges is not given: runtime (all four), offline (helpfulness and process), or
    another name of them. None: offline."""
    models: Models
    """Who judges."""
    model_configs: ModelConfigs = ModelConfigs()
    """How they are asked."""
    active_judges: dict[JudgeName, bool] | None = None
    """Judges by name; one that is not named is off. None: those of the preset."""
    judge_weights: dict[JudgeName, Annotated[float, Field(gt=0)]] = {}
    """Weight of each judge in the mean; 1 where none is given."""
    temperatures: tuple[Annotated[float, Field(ge=0, le=2)], ...] = Field(default=(0.2, 0.5, 0.8), min_length=1)
    """One call of the small model for each."""
    variance_threshold: float = Field(default=0.15, ge=0)
    """Standard deviation (not variance) of the small model's scores above which the large one decides."""
    uncertainty_threshold: Share = 0.3
    """Largest uncertainty of the small model above which the large one decides."""
    escalation_temperature: float = Field(default=0.3, ge=0, le=2)
    """Of the large model."""
    consistency_rules: ConsistencyRules = ConsistencyRules()
    """Bounds between judges."""
    anti_gaming: AntiGaming = AntiGaming()
    """Detectors of text that works on the judge."""
    parallel_execution: ParallelExecution = ParallelExecution()
    """Calls at once for one group."""
    max_concurrent_judge_calls: int = Field(default=32, ge=1)
    """Judge calls in flight for the whole reward, all groups together."""
    judge_timeout: float = Field(default=60.0, gt=0)
    """Seconds that one call may take."""
    judge_retries: int = Field(default=3, ge=0)
    """Further tries of a call that the server failed."""
    retry_backoff_s: float = Field(default=1.0, ge=0)
    """Pause before the first of them, in seconds; it doubles each time."""
    breaker: Breaker = Breaker()
    """When to stop scoring."""
    cache_size: int = Field(default=10_000, ge=0)
    """Verdicts kept in memory; 0: none."""
    cache_dir: str | None = None
    """Folder where verdicts are kept for later runs. None: memory only."""
    constitution_principles: str = ""
    """Rules that every judge weighs in, where a trajectory brings none of its own."""
    reward_log_name: str = Field(default="interpretation_teaching", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of this reward in metrics."""
    teacher_reward: TeacherReward = TeacherReward()
    """Accepted for old configs."""

    @model_validator(mode="after")
    def _all_models_have_prices_or_none(self) -> Self:
        small, large = self.model_configs.default, self.model_configs.large
        if self.models.large_model is None and large.is_priced:
            raise ValueError(
                "model_configs.large gives prices, and models.large_model names no model that they could be of: name one, "
                "or move the prices to model_configs.default if they are those of small_model"
            )
        if self.models.large_model is not None and small.is_priced != large.is_priced:
            raise ValueError(
                "model_configs gives prices for one of small_model (default) and large_model (large), so that rim/cost "
                "would be too low: give them for both, 0 where it costs nothing"
            )
        return self

    @model_validator(mode="after")
    def _somebody_judges(self) -> Self:
        if not self.judges:
            raise ValueError(f"active_judges switches every judge off; switch one on: {', '.join(ALL_JUDGES)}")
        idle = sorted(set(self.judge_weights) - set(self.judges))
        if idle:
            raise ValueError(
                f"judge_weights names {idle[0]}, who does not judge: {', '.join(self.judges)} do; switch it on in active_judges"
            )
        return self

    @property
    def judges(self) -> tuple[JudgeName, ...]:
        """Those that active_judges switches on, or else those of the preset, in their usual order."""
        if self.active_judges is None:
            return PRESETS[self.preset or DEFAULT_PRESET]
        return tuple(name for name in ALL_JUDGES if self.active_judges.get(name))

    @classmethod
    def read(cls, values: Any) -> Self:
        """The config of a mapping, for instance of a YAML file.

        Raises:
            ConfigError: a key is unknown or a value is wrong; names it.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = "; ".join(
                f"rim.{'.'.join(map(str, one['loc']))}: {one['msg']}" if one["loc"] else f"rim: {one['msg']}"
                for one in error.errors(include_input=False, include_url=False)
            )
            raise ConfigError(wrong) from None
