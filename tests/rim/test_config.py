"""The config of RIM, and where the names of its models lead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from atroposlib.envs.command_line.options import resolve
from atroposlib.envs.command_line.usage import UsageError
from atroposlib.errors import ConfigError
from atroposlib.rim.config import ALL_JUDGES, REWARD_NAMES, TEACHING, ModelConfig, RIMConfig
from atroposlib.rim.endpoints import PROVIDERS, Endpoint, endpoint_of
from atroposlib.teaching.config import TeacherEnvConfig
from environments.teaching import TeachingEnv

LOCAL = {"small_model": "http://localhost:9003/v1#judge"}


def read(**values: Any) -> RIMConfig:
    return RIMConfig.read({"models": LOCAL, **values})


def test_the_documented_values_are_the_defaults() -> None:
    config = read()

    assert config.temperatures == (0.2, 0.5, 0.8)
    assert (config.variance_threshold, config.uncertainty_threshold) == (0.15, 0.3)
    assert config.judges == ("helpfulness", "process")
    assert config.anti_gaming.cap_score == 0.3
    assert (config.parallel_execution.max_workers, config.max_concurrent_judge_calls) == (8, 32)
    assert (config.judge_timeout, config.escalation_temperature) == (60.0, 0.3)
    assert config.reward_log_name == "interpretation_teaching"


@pytest.mark.parametrize(
    ("name", "judges"),
    [
        ("runtime", ("accuracy", "helpfulness", "process", "diagnostic")),
        ("interpretation", ("accuracy", "helpfulness", "process", "diagnostic")),
        ("offline", ("helpfulness", "process")),
        ("interpretation_offline", ("helpfulness", "process")),
        ("interpretation_teaching", ("helpfulness", "process")),
        ("rim_teaching", ("helpfulness", "process")),
        (None, ("helpfulness", "process")),
    ],
)
def test_presets_differ_in_their_judges(name: str | None, judges: tuple[str, ...]) -> None:
    assert read(preset=name).judges == judges
    assert read(preset=name).active_judges is None


def test_other_keys_are_laid_over_a_preset() -> None:
    config = read(preset="runtime", temperatures=[0.0])
    chosen = read(preset="runtime", active_judges={"accuracy": True})

    assert (config.temperatures, len(config.judges)) == ((0.0,), 4)
    assert chosen.judges == ("accuracy",)


def test_an_environment_takes_a_preset() -> None:
    config = TeacherEnvConfig.model_validate({"rim": {"preset": "runtime", "models": LOCAL}})

    assert config.rim is not None
    assert config.rim.judges == ALL_JUDGES
    assert TeacherEnvConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError, match="no RIM preset 'online'; known: runtime, interpretation, offline"):
        TeacherEnvConfig.model_validate({"rim": {"preset": "online", "models": LOCAL}})


def test_a_command_line_takes_a_preset() -> None:
    def judges_of(preset: str) -> Any:
        rim = f"{{preset: {preset}, models: {{small_model: gemini/gemini-2.5-flash}}}}"
        env: Any = resolve(TeachingEnv, ["--rim", rim], mode_defaults={}).env
        return env.rim.judges

    assert judges_of("runtime") == ALL_JUDGES
    assert judges_of("rim_teaching") == ("helpfulness", "process")
    with pytest.raises(UsageError, match=r"--rim.*no RIM preset 'online'; known: runtime, interpretation, offline"):
        judges_of("online")


def test_a_file_lays_a_preset_over_the_judges_models_of_an_environment(tmp_path: Path) -> None:
    class Judged(TeachingEnv):
        @classmethod
        def config_init(cls) -> Any:
            config, servers = super().config_init()
            return config.model_copy(update={"rim": read(temperatures=[0.0])}), servers

    file = tmp_path / "env.yaml"
    file.write_text("env: {rim: {preset: runtime}}\n")

    env: Any = resolve(Judged, ["--config", str(file)], mode_defaults={}).env

    assert env.rim == read(temperatures=[0.0], preset="runtime")
    assert env.rim.judges == ALL_JUDGES


@pytest.mark.parametrize(
    ("base", "section", "judges"),
    [
        ({"preset": "runtime"}, {"preset": "offline"}, TEACHING),
        ({"preset": "offline"}, {"preset": "interpretation"}, ALL_JUDGES),
        ({"preset": "runtime"}, {"active_judges": {"accuracy": True}}, ("accuracy",)),
        ({"active_judges": {"accuracy": True}}, {"preset": "runtime"}, ("accuracy",)),
        ({"active_judges": {"accuracy": True}}, {"preset": "runtime", "active_judges": None}, ALL_JUDGES),
    ],
)
def test_a_file_lays_a_preset_over_that_of_an_environment(
    tmp_path: Path, base: dict[str, Any], section: dict[str, Any], judges: tuple[str, ...]
) -> None:
    class Judged(TeachingEnv):
        @classmethod
        def config_init(cls) -> Any:
            config, servers = super().config_init()
            return config.model_copy(update={"rim": read(**base)}), servers

    file = tmp_path / "env.yaml"
    file.write_text(yaml.safe_dump({"env": {"rim": section}}))

    env: Any = resolve(Judged, ["--config", str(file)], mode_defaults={}).env

    assert env.rim.judges == judges


def test_the_preset_can_be_edited_in_what_a_dry_run_prints(tmp_path: Path) -> None:
    rim = "{preset: runtime, models: {small_model: gemini/gemini-2.5-flash}}"
    printed = resolve(TeachingEnv, ["--rim", rim], mode_defaults={}).as_yaml()
    file = tmp_path / "env.yaml"
    file.write_text(printed.replace("preset: runtime", "preset: offline"))

    env: Any = resolve(TeachingEnv, ["--config", str(file)], mode_defaults={}).env

    assert file.read_text() != printed
    assert env.rim.judges == TEACHING


# Prices


def test_a_call_costs_its_tokens_at_the_price_of_a_million() -> None:
    assert ModelConfig(prompt_price=2.0, completion_price=10.0).cost(3_000_000, 500_000) == 11.0
    assert ModelConfig().cost(3_000_000, 500_000) == 0.0


def test_the_large_model_needs_prices_where_the_small_one_has_them_and_it_is_asked() -> None:
    prices = {"default": {"prompt_price": 1.0, "completion_price": 2.0}}

    assert read(model_configs=prices).model_configs.default.is_priced
    with pytest.raises(ConfigError, match=r"gives prices for one of small_model .* and large_model"):
        read(model_configs=prices, models=LOCAL | {"large_model": "gemini/gemini-2.5-pro"})


@pytest.mark.parametrize("small", [{}, {"prompt_price": 1.0, "completion_price": 2.0}])
def test_prices_of_a_large_model_that_there_is_not_are_refused(small: dict[str, float]) -> None:
    prices = {"default": small, "large": {"prompt_price": 1.0, "completion_price": 2.0}}

    with pytest.raises(ConfigError, match=r"model_configs\.large gives prices, and models\.large_model names no model"):
        read(model_configs=prices)


@pytest.mark.parametrize("name", REWARD_NAMES)
def test_the_old_layout_of_the_reward_is_taken(name: str) -> None:
    config = read(teacher_reward={"_target_": name, "student_model": None, "teacher_model": None, "tokenizer": None})

    assert config.teacher_reward.target == name


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"preset": "online"}, r"rim\.preset: .*no RIM preset 'online'; known: runtime, interpretation, offline"),
        ({"preset": ["runtime"]}, r"rim\.preset: .*valid string"),
        ({"model_configs": {"default": {"prompt_price": 1.0}}}, r"rim\.model_configs\.default: .*give both, 0 where"),
        (
            {"model_configs": {"large": {"prompt_price": 1.0, "completion_price": -1.0}}},
            r"rim\.model_configs\.large\.completion_price: .*greater than or equal to 0",
        ),
        ({"models": {}}, r"rim\.models\.small_model: Field required"),
        ({"temperature": [0.5]}, r"rim\.temperature: Extra inputs"),
        ({"temperatures": []}, r"rim\.temperatures: .*at least 1"),
        ({"temperatures": [2.5]}, r"rim\.temperatures\.0: .*less than or equal to 2"),
        ({"active_judges": {"kindness": True}}, r"rim\.active_judges\.kindness.*'accuracy', 'helpfulness'"),
        ({"active_judges": {"accuracy": False}}, "switches every judge off"),
        (
            {"judge_weights": {"accuracy": 2.0}},
            "judge_weights names accuracy, who does not judge: helpfulness, process do",
        ),
        ({"judge_weights": {"process": 0}}, r"rim\.judge_weights\.process: .*greater than 0"),
        ({"anti_gaming": {"cap_score": 1.5}}, r"rim\.anti_gaming\.cap_score: .*less than or equal to 1"),
        ({"parallel_execution": {"max_workers": 0}}, r"rim\.parallel_execution\.max_workers: .*greater than or equal"),
        ({"max_concurrent_judge_calls": 0}, r"rim\.max_concurrent_judge_calls"),
        ({"judge_timeout": float("inf")}, r"rim\.judge_timeout: .*finite"),
        ({"judge_weights": {"process": float("nan")}}, r"rim\.judge_weights\.process"),
        ({"judge_timeout": 0}, r"rim\.judge_timeout: .*greater than 0"),
        ({"uncertainty_threshold": 2}, r"rim\.uncertainty_threshold"),
        ({"consistency_rules": {"contradiction_penalty": 0.2}}, "contradiction_penalty has never had an effect"),
        ({"consistency_rules": {"order": ["alphabetic"]}}, r"rim\.consistency_rules\.order\.0"),
        ({"reward_log_name": "a b"}, r"rim\.reward_log_name"),
        ({"teacher_reward": {"_target_": "my.Reward"}}, "_target_ is 'my.Reward'; known: rim"),
        ({"teacher_reward": {"student_model": "x"}}, r"rim\.teacher_reward\.student_model: .*None"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(**values)


class SomebodysConfig(BaseModel):
    rim: RIMConfig


@pytest.mark.parametrize("key", ["sk-secret", "env:", "env:sk-secret", ["sk-secret"], {"value": "sk-secret"}])
def test_a_key_in_the_clear_is_refused_and_not_repeated(key: Any) -> None:
    values = {"models": LOCAL, "model_configs": {"large": {"api_key": key}}}

    with pytest.raises(ConfigError, match=r"rim\.model_configs\.large\.api_key: .*env:GEMINI_API_KEY") as ours:
        RIMConfig.read(values)
    with pytest.raises(ValidationError) as somebodys:
        SomebodysConfig.model_validate({"rim": values})

    with pytest.raises(ValidationError) as with_a_wrong_preset:
        SomebodysConfig.model_validate({"rim": {**values, "preset": "online"}})

    said = f"{ours.value} {somebodys.value} {somebodys.value.errors()} {with_a_wrong_preset.value.errors()}"
    assert "sk-secret" not in said


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        read().temperatures = (1.0,)


# Names of models


def test_a_provider_stands_for_its_address_and_its_variable() -> None:
    found = endpoint_of("gemini/gemini-2.5-flash", ModelConfig(), {"GEMINI_API_KEY": "k"})

    assert found == Endpoint(PROVIDERS["gemini"].base_url, "gemini-2.5-flash", "k", "max_tokens")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("perplexity/sonar", Endpoint("https://api.perplexity.ai", "sonar", "k")),
        ("cerebras/qwen-3-32b", Endpoint("https://api.cerebras.ai/v1", "qwen-3-32b", "k", "max_completion_tokens")),
        (
            "fireworks_ai/accounts/fireworks/models/qwen3-8b",
            Endpoint("https://api.fireworks.ai/inference/v1", "accounts/fireworks/models/qwen3-8b", "k"),
        ),
    ],
)
def test_services_by_the_names_that_litellm_gives_them(name: str, found: Endpoint) -> None:
    variable = PROVIDERS[name.partition("/")[0]].key_variable or ""

    assert endpoint_of(name, ModelConfig(), {variable: "k"}) == found


def test_ollama_needs_no_key_and_may_listen_elsewhere() -> None:
    elsewhere = ModelConfig(base_url="http://gpu:11434/v1")

    assert endpoint_of("ollama/qwen3:8b", ModelConfig(), {}) == Endpoint("http://localhost:11434/v1", "qwen3:8b")
    assert endpoint_of("ollama/qwen3:8b", elsewhere, {}) == Endpoint("http://gpu:11434/v1", "qwen3:8b")


@pytest.mark.parametrize("name", ["gpt-4o-mini", "gpt-5", "chatgpt-4o-latest", "o1", "o3-mini", "o4-mini"])
def test_a_bare_name_that_is_openais_alone_is_asked_there(name: str) -> None:
    environ = {"OPENAI_API_KEY": "k"}

    assert endpoint_of(name, ModelConfig(), environ) == endpoint_of(f"openai/{name}", ModelConfig(), environ)
    assert endpoint_of(name, ModelConfig(base_url="http://gpu:8000/v1"), {}).base_url == "http://gpu:8000/v1"


def test_only_the_first_part_is_the_provider() -> None:
    found = endpoint_of("openrouter/qwen/qwen3", ModelConfig(), {"OPENROUTER_API_KEY": "k"})

    assert found.model == "qwen/qwen3"


def test_an_address_with_a_model_needs_no_key() -> None:
    assert endpoint_of("http://localhost:9003/v1/#a/b", ModelConfig(), {}) == Endpoint(
        "http://localhost:9003/v1", "a/b"
    )


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("openai/judge", "judge"),
        ("hosted_vllm/Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("j", "j"),
    ],
)
def test_a_base_url_takes_any_name(name: str, model: str) -> None:
    config = ModelConfig(base_url="http://gpu:8000/v1", api_key="env:MY_KEY")

    assert endpoint_of(name, config, {"MY_KEY": "k"}) == Endpoint("http://gpu:8000/v1", model, "k")


def test_another_variable_may_hold_the_key() -> None:
    assert endpoint_of("openai/gpt", ModelConfig(api_key="env:MINE"), {"MINE": "k"}).api_key == "k"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemini/g", "looked for in GEMINI_API_KEY, which is not set"),
        ("llama3", "names no provider that is known"),
        ("gpt-oss-120b", "names no provider that is known"),
        ("gpt-4o/mini", "names no provider that is known"),
        ("o10", "names no provider that is known"),
        ("nobody/llama3", "names no provider that is known"),
        ("openai/", "names no provider that is known"),
        ("http://localhost/v1", "names no model; write http"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_write(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        endpoint_of(name, ModelConfig(), {})


def test_a_key_is_not_shown() -> None:
    found = endpoint_of("openai/gpt", ModelConfig(), {"OPENAI_API_KEY": "sk-secret"})

    assert "sk-secret" not in f"{found} {found!r}"
