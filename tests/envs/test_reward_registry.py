"""Rewards are found by name, their failures are never a reward of 0, and combinations respect weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atroposlib.envs.reward_fns import CombinedReward, RewardFunction, registry
from atroposlib.envs.reward_fns.registry import LegacyFunctionWrapper, RewardRegistry
from atroposlib.errors import ConfigError, ModelServerError, RolloutError

KEYS = {
    "accuracy": "AccuracyReward",
    "accuracy_reward": "AccuracyReward",
    "AccuracyReward": "AccuracyReward",
    "format": "FormatReward",
    "format_reward": "FormatReward",
    "formatreasoning": "FormatReasoningReward",
    "accuracyx": "AccuracyXReward",
    "r1": "R1Reward",
    "r1_reward": "R1Reward",
    "reasoning_steps": "ReasoningStepsReward",
    "reasoningsteps": "ReasoningStepsReward",
    "repetition_penalty": "RepetitionPenaltyReward",
    "cosine_scaled": "CosineScaledReward",
    "crossword_format": "CrosswordFormatReward",
    "chandas_meter": "ChandasMeterReward",
    "combined": "CombinedReward",
}


class Constant(RewardFunction):
    """Pays the same to everyone, or fails."""

    def __init__(self, value: float = 1.0, error: Exception | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.value, self.error = value, error

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        if self.error is not None:
            raise self.error
        return [self.value] * len(completions)


# Names


@pytest.mark.parametrize(("key", "cls"), KEYS.items())
def test_every_key_means_the_class_of_its_name(key: str, cls: str) -> None:
    assert getattr(registry.get(key), "__name__", "") == cls


@pytest.mark.parametrize("key", ["r1", "cascading_r1_math", "cascading_r1_math_reward", "reasoning_steps_reward"])
def test_a_name_is_found_by_a_fresh_interpreter(key: str) -> None:
    code = f"from atroposlib.envs.reward_fns import registry; print(registry.create({key!r}).name)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip().replace("_", "").removesuffix("reward") == key.replace("_", "").removesuffix("reward")


def test_the_registry_loads_nothing_heavy() -> None:
    code = (
        "import sys; from atroposlib.envs.reward_fns import registry;"
        "[registry.get(key) for key in registry.list_registered()];"
        "print([name for name in ('torch', 'transformers', 'sympy', 'openai') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "[]"


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'acuracy'.*accuracy.*registry\.register"):
        registry.get("acuracy")


def test_classes_and_functions_register_under_their_own_name_or_another() -> None:
    own = RewardRegistry()
    own.register(type("LengthReward", (Constant,), {}))
    own.register(name="short")(Constant)
    own.register_function("plain", lambda completions, bonus=1.0: [bonus] * len(completions))

    assert {"length", "short", "plain"} <= set(own.list_registered())
    assert own.create("length_reward", value=3.0)(["a"]) == [3.0]
    assert own.create("plain", bonus=2.0, weight=0.5)(["a", "b"]) == [1.0, 1.0]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> RewardRegistry:
    """The registry that files register with, as it was before the test."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_folders", [])
    return registry


@pytest.mark.parametrize("stem", ["brevity", "brevity_reward"])
@pytest.mark.parametrize(
    "source",
    [
        "@registry.register\nclass BrevityReward(RewardFunction):\n    def compute(self, completions, **kwargs): return [7.0]",
        "class Another(RewardFunction):\n    def compute(self, completions, **kwargs): return [0.0]\n"
        "class BrevityReward(RewardFunction):\n    def compute(self, completions, **kwargs): return [7.0]",
        "def brevity_reward(completions): return [7.0]",
    ],
    ids=["registered", "class", "function"],
)
def test_a_file_is_loaded_by_its_name(stem: str, source: str, tmp_path: Path, own: RewardRegistry) -> None:
    (tmp_path / f"{stem}.py").write_text(f"from atroposlib.envs.reward_fns import RewardFunction, registry\n{source}\n")
    own.add_folder(tmp_path)

    assert own.create("brevity")(["x"]) == [7.0]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("1/0")
    (tmp_path / "empty.py").write_text("")
    own = RewardRegistry()
    own.add_folder(tmp_path)

    with pytest.raises(ConfigError, match=r"odd\.py does not load: ZeroDivisionError"):
        own.get("odd")
    with pytest.raises(ConfigError, match=r"empty\.py defines no reward"):
        own.get("empty")


def test_a_name_is_never_a_path(tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("raise SystemExit")
    (tmp_path / "inner").mkdir()
    own = RewardRegistry()
    own.add_folder(tmp_path / "inner")

    with pytest.raises(ConfigError, match="unknown reward function"):
        own.get("../secret")


# Configs


def test_params_win_over_the_config_and_that_over_defaults() -> None:
    own = RewardRegistry()
    own.register(Constant, name="constant")

    made = own.create({"type": "constant", "weight": 2.0, "params": {"value": 3.0}}, weight=9.0, value=9.0, name="c")

    assert (made(["x"]), made.name) == ([6.0], "c")


@pytest.mark.parametrize("config", [{}, {"weight": 1.0}])
def test_a_config_needs_a_type(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a type"):
        registry.create(config)


def test_every_reward_that_a_config_names_is_loaded() -> None:
    config = SimpleNamespace(
        reward_functions=["accuracy", {"type": "format"}],
        datasets=[{"dataset_reward_funcs": ["r1"]}, {"dataset_reward_funcs": None}],
        group_size=4,
    )

    assert registry.load_required_functions(config) == {"accuracy", "format", "r1"}
    with pytest.raises(ConfigError, match="'nosuch'"):
        registry.load_required_functions({"reward_functions": ["nosuch"]})


# Calls


def test_a_call_multiplies_by_the_weight() -> None:
    assert Constant(2.0, weight=0.5)(["a", "b"]) == [1.0, 1.0]
    assert Constant().name == "constant"


@pytest.mark.parametrize(
    "reward",
    [
        Constant(error=ZeroDivisionError("by zero")),
        Constant(float("nan")),
        LegacyFunctionWrapper(lambda completions: [1.0]),
    ],
    ids=["raises", "not finite", "one for two"],
)
def test_a_broken_grader_is_no_reward_of_zero(reward: RewardFunction) -> None:
    with pytest.raises(RolloutError, match="failed"):
        reward(["a", "b"])


def test_the_cause_of_a_failure_is_kept() -> None:
    cause = ZeroDivisionError("by zero")

    with pytest.raises(RolloutError, match=r"'constant' failed: ZeroDivisionError: by zero") as caught:
        Constant(error=cause)(["a"])

    assert caught.value.__cause__ is cause


def test_our_own_errors_pass_as_they_are() -> None:
    with pytest.raises(ModelServerError, match="judge is down"):
        Constant(error=ModelServerError("judge is down"))(["a"])


def test_zeros_are_paid_for_a_failure_when_asked() -> None:
    assert Constant(error=ValueError("x"), zero_on_error=True)(["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "content"),
    [
        ("text", "text"),
        ({"role": "assistant", "content": "a"}, "a"),
        ({"message": {"role": "assistant", "content": "b"}}, "b"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}], "c"),
        ({"role": "assistant", "content": [{"type": "text", "text": "d"}, {"type": "image_url"}]}, "d"),
        ({"content": "no role"}, ""),
        ([{"role": "user", "content": "q"}], ""),
        ({"role": "assistant", "content": None}, ""),
        (None, ""),
    ],
)
def test_the_text_of_a_completion(completion: Any, content: str) -> None:
    assert RewardFunction.get_content(completion) == content


class Log:
    """A logger that keeps."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics


def test_rewards_are_logged_under_their_name() -> None:
    log, reward = Log(), LegacyFunctionWrapper(lambda completions: [1.0, 3.0], weight=0.5, name="mine")
    reward.set_wandb_logger(log)

    reward(["a", "b"])

    names = {"mean_raw": 2.0, "mean_weighted": 1.0, "min": 0.5, "max": 1.5}
    assert log.metrics == {f"reward/mine/{key}": value for key, value in names.items()}


# Combinations


def pair(**kwargs: Any) -> CombinedReward:
    return CombinedReward([Constant(1.0, weight=3.0, name="a"), Constant(2.0, weight=1.0, name="b")], **kwargs)


def test_parts_are_added_up_by_their_weights() -> None:
    assert pair()(["x"]) == [5.0]
    assert pair(weight=2.0)(["x"]) == [10.0]
    assert pair().name == "combined(a,b)"


def test_the_weights_are_ignored_when_asked() -> None:
    assert pair(ignore_weights=True)(["x"]) == [3.0]


def test_sum_divides_by_the_weights() -> None:
    assert pair(normalization="sum")(["x"]) == [1.25]


def test_minmax_stretches_the_rewards_of_a_call() -> None:
    by_length = LegacyFunctionWrapper(lambda completions: [len(text) for text in completions])

    assert CombinedReward([by_length], normalization="minmax")(["a", "aaa", "aa"]) == [0.0, 1.0, 0.5]
    assert CombinedReward([by_length], normalization="minmax")(["a", "b"]) == [0.0, 0.0]


def test_a_failing_part_fails_the_whole_unless_it_pays_zeros() -> None:
    broken: dict[str, Any] = {"error": ValueError("x"), "name": "broken"}

    with pytest.raises(RolloutError, match="'broken' failed"):
        CombinedReward([Constant(), Constant(**broken)])(["x"])
    assert CombinedReward([Constant(), Constant(**broken, zero_on_error=True)])(["x"]) == [1.0]


def test_the_parts_are_logged_too() -> None:
    log, reward = Log(), pair()
    reward.set_wandb_logger(log)

    reward(["x"])

    assert log.metrics["reward/a/mean_weighted"] == 3.0
    assert log.metrics["reward/combined(a,b)/mean_raw"] == 5.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": []}, "at least one"),
        ({"rewards": ["format"], "normalization": "avg"}, "'avg'"),
        ({"rewards": [{"type": "format", "weight": 0.0}], "normalization": "sum"}, "which is 0"),
        ({"rewards": ["nosuch"]}, "'nosuch'"),
    ],
)
def test_a_combination_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CombinedReward(**arguments)


def test_combinations_are_made_from_configs() -> None:
    config = {"type": "combined", "params": {"rewards": ["format", {"type": "r1", "weight": 2.0}]}}

    assert registry.create(config)(["<think>a</think>42"], solution="42") == [1.0 + 2.0 * 1.5]
