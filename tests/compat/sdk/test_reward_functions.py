"""Keys, parameters and values of the bundled rewards; their details are tested beside them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from atroposlib.envs.reward_fns import CombinedReward, RewardFunction, registry
from atroposlib.envs.reward_fns.registry import LegacyFunctionWrapper
from atroposlib.errors import RolloutError

PARAMETERS: dict[str, dict[str, Any]] = {
    "accuracy": {"tolerance": 1e-6, "split_on_think_tag": True, "max_boxed_threshold": 6},
    "format": {"require_all_tags": False, "case_sensitive": False},
    "formatreasoning": {"reward_value": 0.5, "require_thinking": True, "require_response": True, "allow_multiple_thinking": False},
    "accuracyx": {"exact_match": False, "case_sensitive": False, "reward_value": 1.0},
    "r1": {"format_weight": 0.5, "accuracy_weight": 1.0},
    "reasoning_steps": {"min_words": 10, "min_steps": 3, "base_score": 0.1},
    "repetition_penalty": {
        "threshold": 0.05, "min_words": 10, "min_sentences": 2, "short_text_penalty": -0.1,
        "paragraph_repetition_base_penalty": -0.6,
    },
    "crossword_format": {"reward_value": 1.0, "penalize_invalid_chars": True},
    "chandas_meter": {"meter": "tristubh"},
    "combined": {"normalization": "none"},
}  # fmt: skip
ROWS = [(key, name, default) for key, defaults in PARAMETERS.items() for name, default in defaults.items()]


@pytest.mark.parametrize(("key", "name", "default"), ROWS)
def test_a_parameter_has_its_default(key: str, name: str, default: Any) -> None:
    found = inspect.signature(registry.get(key)).parameters[name].default

    assert (found, type(found)) == (default, type(default))


@pytest.mark.parametrize(
    "key", ["accuracy", "accuracy_reward", "format_reward", "r1_reward", "reasoningsteps", "crossword_format"]
)
def test_every_form_of_a_key_makes_a_reward(key: str) -> None:
    assert isinstance(registry.create(key, weight=2.0), RewardFunction)
    assert registry.create({"type": key, "weight": 2.0}).weight == 2.0
    assert registry.create({"type": key, "params": {"weight": 2.0}}).weight == 2.0


def pay(key: str, *completions: Any, **facts: Any) -> list[float]:
    return registry.create(key)(list(completions), **facts)


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        (r"<think>\boxed{1}</think> so \boxed{42}", {"solution": "42"}, 1.0),
        (r"\boxed{41}", {"solution": "42"}, 0.0),
        ("#### 42", {"ground_truth": "6 * 7\n#### 42"}, 1.0),
        (r"\boxed{42}", {"solution": "41", "ground_truth": ["42"]}, 1.0),
        ("</think>" + r"\boxed{42}" * 7, {"solution": "42"}, 0.0),
    ],
    ids=["after-thinking", "wrong", "hashed", "ground-truth-first", "too-many-boxes"],
)
def test_accuracy(text: str, gold: dict[str, Any], reward: float) -> None:
    assert pay("accuracy", text, **gold) == [reward]


def test_format_wants_any_tag_or_all() -> None:
    texts = ["<think>a</think>", "<ANSWER>a</ANSWER>", "<think>a", "none"]

    assert pay("format", *texts) == [1.0, 1.0, 0.0, 0.0]
    assert registry.create("format", require_all_tags=True)([*texts[:1], "<think>a</think><answer>b</answer>"]) == [
        0.0,
        1.0,
    ]


def test_accuracyx_looks_for_the_solution_after_the_thinking() -> None:
    assert pay("accuracyx", "<think>7</think>it is forty-two", solution="forty-two") == [1.0]
    assert pay("accuracyx", "<think>forty-two</think>no", solution="forty-two") == [0.0]


def test_r1_is_half_for_the_form_and_one_for_the_answer() -> None:
    texts = ["<think>a</think>42", "<think>a</think>41", "none"]

    assert pay("r1", *texts, solution="42") == [1.5, 0.5, 0.0]


def test_a_cascade_pays_the_form_only_where_the_answer_is_right() -> None:
    texts = [r"<think>a</think>\boxed{42}", r"\boxed{42}", r"<think>a</think>\boxed{41}"]

    assert pay("cascading_r1_math", *texts, solution="42") == [1.5, 1.0, 0.0]


def test_repetition_costs_from_a_tenth_to_one() -> None:
    plain = "One two three four five six. Then others came along here today."

    short, repeated, varied = pay("repetition_penalty", "short.", "The cat sat on the mat. " * 4, plain)

    assert short == -0.1
    assert -1.0 <= repeated <= -0.6
    assert varied == 0.0


def test_steps_are_capped_at_one() -> None:
    words = "First, we look. Then, we think. Therefore, we act because it follows from that. "
    many = "1. a\n2. b\n3. c\n- d\n- e\n- f\n" + words * 3

    assert pay("reasoning_steps", many) == [1.0]


def test_a_call_multiplies_by_the_weight_and_compute_does_not() -> None:
    reward = registry.create("format", weight=3.0)

    assert reward(["<think>a</think>"]) == [3.0]
    assert reward.compute(["<think>a</think>"]) == [1.0]


def test_a_failure_pays_nothing_only_where_that_was_asked_for() -> None:
    """Atropos 0.4.0 pays 0 to every completion when a grader fails."""

    def broken(completions: list[Any], **kwargs: Any) -> list[float]:
        raise RuntimeError("the grader is down")

    with pytest.raises(RolloutError, match="the grader is down"):
        LegacyFunctionWrapper(broken)(["a", "b"])
    assert LegacyFunctionWrapper(broken, zero_on_error=True)(["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ({"role": "assistant", "content": "said"}, "said"),
        ({"message": {"role": "assistant", "content": "said"}}, "said"),
        ([{"role": "user", "content": "asked"}, {"role": "assistant", "content": "said"}], "said"),
        ({"content": "of nobody"}, ""),
        (None, ""),
    ],
)
def test_the_text_of_a_completion(completion: Any, text: str) -> None:
    assert RewardFunction.get_content(completion) == text


def test_names() -> None:
    class MyReward(RewardFunction):
        def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
            return [0.0] * len(completions)

    assert (MyReward().name, MyReward(name="own").name) == ("myreward", "own")
    assert CombinedReward(["format", "accuracy"]).name == "combined(formatreward,accuracyreward)"


def test_figures_of_a_reward_are_logged_under_its_name() -> None:
    logged: list[dict[str, float]] = []

    class Logger:
        def log(self, metrics: dict[str, float]) -> None:
            logged.append(metrics)

    reward = registry.create("format", weight=2.0)
    reward.set_wandb_logger(Logger())
    reward(["<think>a</think>", "none"])

    [metrics] = logged
    prefix = f"reward/{reward.name}"
    assert {"mean_raw", "mean_weighted", "min", "max"} <= {key.removeprefix(f"{prefix}/") for key in metrics}
    assert (metrics[f"{prefix}/mean_raw"], metrics[f"{prefix}/mean_weighted"]) == (0.5, 1.0)


def test_every_reward_that_a_config_names_is_loaded() -> None:
    assert registry.load_required_functions({"reward_functions": ["accuracy", {"type": "format"}]}) <= set(
        registry.list_registered()
    )
    assert {"accuracy", "format"} <= set(registry.list_registered())
