"""The data types that environment authors meet, under their upstream names."""

from __future__ import annotations

from typing import Any, TypeAlias, TypedDict

Content: TypeAlias = str | list[dict[str, Any]]
Item: TypeAlias = Any
"""One thing to roll out: a problem, a prompt with its answer."""
number: TypeAlias = int | float
UUID: TypeAlias = str
VersionRuns: TypeAlias = list[tuple[int, int]]
"""Runs of (policy version, length) over a sequence's tokens; version -1 where nobody sampled."""

MASKED = -100
"""Entry of `masks` for a token that is not trained; trained tokens repeat their id."""


class Message(TypedDict, total=False):
    """One chat message; role and content are always there."""

    role: str
    content: Content
    reward: float | None


class ScoredDataGroup(TypedDict, total=False):
    """The trajectories of one item, scored against each other: one entry a sequence in every list."""

    tokens: list[list[int]]
    masks: list[list[int]]
    scores: list[float]
    advantages: list[list[float]] | list[float] | None
    ref_logprobs: list[list[float]] | None
    messages: list[Any] | None
    generation_params: dict[str, Any] | None
    inference_logprobs: list[list[float]] | None
    group_overrides: dict[str, Any] | None
    overrides: list[dict[str, Any]] | None
    images: Any
    distill_token_ids: list[list[list[int]]] | None
    distill_logprobs: list[list[list[float]]] | None
    policy_versions: list[VersionRuns] | None
    """Ours: what the engine reported for every token."""
    finish_reasons: list[str] | None
    """Ours: stop, length, tool_calls, one a sequence."""


class ScoredDataItem(TypedDict, total=False):
    """One trajectory with its score: what collect_trajectory returns."""

    tokens: list[int]
    masks: list[int]
    scores: float
    advantages: list[float] | float | None
    ref_logprobs: list[float] | None
    messages: Any
    generation_params: dict[str, Any] | None
    inference_logprobs: list[float] | None
    group_overrides: dict[str, Any] | None
    overrides: dict[str, Any] | None
    images: Any
    distill_token_ids: list[list[int]] | None
    distill_logprobs: list[list[float]] | None
    policy_versions: VersionRuns | None
    finish_reason: str | None


class AgentStep(TypedDict, total=False):
    """One agent's turn: what it saw and said, and what it earned."""

    step: int
    messages: list[Message]
    reward: float


AgentHistory: TypeAlias = dict[str, list[AgentStep]]
"""The turns of each agent, by its id."""


class Observation(TypedDict):
    """What an agent sees of a game."""

    raw: Any
    rendered: Content
    """As the model gets it."""


class GameStep(TypedDict):
    """One move of a game."""

    step: int
    agent_id: str
    observation: Observation
    action: str
    reward: float
    done: bool
    info: dict[str, Any]


GameHistory: TypeAlias = list[GameStep]


class EvaluationConfigGeneral(TypedDict):
    """`config_general` of metrics.json."""

    model_name: str
    total_evaluation_time_seconds: str
    generation_parameters: dict[str, Any]


EvaluationResults: TypeAlias = dict[str, dict[str, float]]
"""Metrics by `atropos|<task>|0`, and by `all`."""


class EvaluationMetrics(TypedDict):
    """metrics.json of an evaluation."""

    config_general: EvaluationConfigGeneral
    results: EvaluationResults


class EvaluationSample(TypedDict, total=False):
    """A line of samples.jsonl; further keys are the environment's own."""

    messages: list[Message]
    question: str
    gold_answer: str
    model_answer: str
    is_correct: bool
    score: float
