"""Local mode as a whole: real rollout server, environment and trainer; the MOCK inference server takes no weights."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from atroposlib.errors import ConfigError
from atroposlib.launch.processes import GUARD, ChildFailedError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer, in_thread
from tests.trainer.fakes import FakePublisher, FakeResult, a_config
from trainer.config.grpo import GRPOConfig
from trainer.errors import RewardFunctionError
from trainer.grpo_trainer import GRPOTrainer
from trainer.local import wiring
from trainer.local.config import LocalConfig
from trainer.local.loop import LocalLoop
from trainer.local.mode import LocalMode
from trainer.local.progress import LiveLine, figures_of

# A request that is given up at the end of a run may leave its socket to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TOKENIZER = byte_tokenizer()
ROWS = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(20)]
PAGE = (Path(__file__).parents[2] / "docs" / "local-mode.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """No socket is left for the tests after this one."""
    yield
    gc.collect()


@pytest.fixture
def engine() -> Iterator[MockInferenceServer]:
    """Says 0, 1, 2, ... to one request for several completions."""
    server = MockInferenceServer(lambda prompt, index: TOKENIZER.encode(f"{index}<|im_end|>"), weight_version="0")
    with in_thread(server):
        yield server


class MockPublisher(FakePublisher):
    """Tells the engine the version, and no weights."""

    def __init__(self, engine: MockInferenceServer) -> None:
        super().__init__()
        self.engine = engine

    def publish(self, version: int, weights: Any) -> FakeResult:
        self.engine.weight_version = str(version)
        return super().publish(version, weights)


def a_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        )
    )  # fmt: skip


def a_trainer(run_dir: Path, engine: MockInferenceServer, reward: Any, **options: Any) -> Any:
    return options.pop("kind", GRPOTrainer)(
        model=a_model(),
        args=a_config(run_dir, group_size=4, max_tokens_per_micro_batch=256, **options.pop("config", {})),
        processing_class=TOKENIZER,
        publisher=options.pop("publisher", None) or MockPublisher(engine),
        reward_funcs=reward,
        train_dataset=ROWS,
        local={"inference": {"url": engine.url}, **options.pop("local", {})},
        **options,
    )


def train(run_dir: Path, engine: MockInferenceServer, reward: Any, **options: Any) -> Any:
    """A run of three steps; the trainer and its local mode."""
    trainer = a_trainer(run_dir, engine, reward, **options)
    trainer.train()
    return trainer, trainer.local


def right(completions: list[str], answer: list[int]) -> list[float]:
    return [float(text == str(number)) for text, number in zip(completions, answer, strict=True)]


def nothing_is_left() -> bool:
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("local-")]
    services = [child for child in psutil.Process().children() if str(GUARD) in child.cmdline()]
    return not threads and not services


def test_functions_and_rows_become_a_run(tmp_path: Path, engine: MockInferenceServer) -> None:
    seen: list[str] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(prompts)
        return [float(text) for text in completions]

    trainer, mode = train(tmp_path, engine, reward, eval_dataset=ROWS[:5])

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["reward/mean"] for line in lines] == [1.5] * 3
    assert max(line["staleness/max"] for line in lines) <= trainer.args.max_staleness
    assert trainer.state.global_step == 3
    assert trainer._publisher.published[-1] == 3
    assert {"0 + 1 =", "19 + 1 ="} <= set(seen)
    assert mode.evaluations == {phase: {"heldout_size": 5, "heldout_reward": 0.0} for phase in ("before", "after")}
    assert (tmp_path / "eval" / "after" / "metrics.json").exists()
    assert nothing_is_left()


def test_the_trainer_and_its_callbacks_hear_of_both_evaluations(tmp_path: Path, engine: MockInferenceServer) -> None:
    heard: list[tuple[str, int, float]] = []

    class Trainer(GRPOTrainer):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(("override", state.global_step, kwargs["metrics"]["heldout_reward"]))

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.append(("callback", state.global_step, kwargs["metrics"]["heldout_reward"]))

    a_trainer(
        tmp_path, engine, right, kind=Trainer, eval_dataset=ROWS[:5], callbacks=[Callback()], config={"max_steps": 1}
    ).train()

    assert heard == [("override", 0, 0.0), ("callback", 0, 0.0), ("override", 1, 0.0), ("callback", 1, 0.0)]


def test_a_reward_model_is_the_last_of_the_reward_functions(tmp_path: Path, engine: MockInferenceServer) -> None:
    def judge(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    with_others = a_trainer(tmp_path / "a", engine, [right], reward_model=judge, reward_weights=[1.0, 0.25])
    alone = a_trainer(tmp_path / "b", engine, None, reward_model=judge)

    assert with_others.local._rewards.names == ["right", "judge"]
    assert with_others.local._rewards.weights == [1.0, 0.25]
    assert alone.local._rewards.names == ["judge"]


def test_a_reward_model_of_tensors_is_refused_at_once(tmp_path: Path, engine: MockInferenceServer) -> None:
    with pytest.raises(ConfigError, match="holds a LlamaForCausalLM, a model that takes token ids: give a function"):
        a_trainer(tmp_path, engine, None, reward_model=a_model())


def test_the_model_may_come_first_and_need_not_be_named_twice(tmp_path: Path) -> None:
    model = a_model()
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")

    trainer = GRPOTrainer(
        name, reward_funcs=right, train_dataset=ROWS, args=GRPOConfig(run_dir=str(tmp_path / "run"), use_cpu=True)
    )

    assert trainer.args.model_name_or_path == name
    assert trainer.args.group_size == 8
    with pytest.raises(ConfigError, match="give one of them"):
        GRPOTrainer(name, model=name)


def test_the_same_folder_goes_on(tmp_path: Path, engine: MockInferenceServer) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, engine, right, config=saving, eval_dataset=ROWS[:5])

    trainer, mode = train(tmp_path, engine, right, config={**saving, "max_steps": 5}, eval_dataset=ROWS[:4])

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert trainer.state.global_step == 5
    # The evaluation before stays that of the first start.
    assert {phase: figures["heldout_size"] for phase, figures in mode.evaluations.items()} == {"after": 4}


def test_equal_rewards_are_trained_unless_they_are_to_be_skipped(tmp_path: Path, engine: MockInferenceServer) -> None:
    one_step = {"max_steps": 1}
    train(tmp_path / "all", engine, lambda completions: [1.0] * len(completions), config=one_step)
    train(tmp_path / "some", engine, right, config=one_step, local={"skip_equal_rewards": True})

    trained = {
        name: json.loads((tmp_path / name / "metrics.jsonl").read_text())["frac_reward_zero_std"]
        for name in ("all", "some")
    }
    assert trained == {"all": 1.0, "some": 0.0}


def test_a_bug_in_a_reward_function_ends_the_run_with_its_name(tmp_path: Path, engine: MockInferenceServer) -> None:
    def buggy(completions: list[str]) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardFunctionError, match="'buggy' failed: KeyError"):
        train(tmp_path, engine, buggy)

    assert nothing_is_left()


def test_ctrl_c_is_raised_and_leaves_nothing(tmp_path: Path, engine: MockInferenceServer) -> None:
    class Interrupted(MockPublisher):
        def publish(self, version: int, weights: Any) -> FakeResult:
            if version == 1:
                raise KeyboardInterrupt
            return super().publish(version, weights)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, engine, right, publisher=Interrupted(engine))

    assert nothing_is_left()


def test_after_ctrl_c_train_may_be_called_again(tmp_path: Path, engine: MockInferenceServer) -> None:
    class InterruptedOnce(MockPublisher):
        is_interrupted = False

        def publish(self, version: int, weights: Any) -> FakeResult:
            if version == 2 and not self.is_interrupted:
                self.is_interrupted = True
                raise KeyboardInterrupt
            return super().publish(version, weights)

    trainer = a_trainer(
        tmp_path, engine, right, publisher=InterruptedOnce(engine), config={"save_strategy": "steps", "save_steps": 1}
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.request_stop("a test")
    assert trainer.args.inference_servers == []

    trainer.train()

    assert trainer.state.global_step == 3
    assert nothing_is_left()


def test_an_engine_that_lost_the_trained_weights_is_not_evaluated(
    tmp_path: Path, engine: MockInferenceServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LocalLoop, "inference_up_since", property(lambda self: time.time()))

    _, mode = train(tmp_path, engine, right, config={"max_steps": 1}, eval_dataset=ROWS[:2])

    assert list(mode.evaluations) == ["before"]
    assert f"the trained model is in {tmp_path / 'final'}" in caplog.text


class _BrokenLoop:
    failure = ChildFailedError("rollout-server", "was killed by SIGKILL", log_path=Path(), tail="")


def test_a_service_that_is_gone_ends_an_evaluation(tmp_path: Path, engine: MockInferenceServer) -> None:
    release = threading.Event()

    def waits(completions: list[str]) -> list[float]:
        release.wait(60.0)
        return [0.0] * len(completions)

    trainer = a_trainer(tmp_path, engine, waits, eval_dataset=ROWS[:1])
    trainer.args.inference_servers = [engine.url]
    with pytest.raises(ChildFailedError, match="rollout-server was killed"), LiveLine(1, is_shown=False) as line:
        trainer.local._evaluate(trainer, line, _BrokenLoop(), "before", is_wanted=True)
    release.set()

    assert nothing_is_left()


# What follows from the options


def named(**options: Any) -> GRPOConfig:
    return GRPOConfig(**{"model_name_or_path": "some/tiny-model", "use_cpu": True, **options})


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_tmp")
def test_a_run_gets_a_fresh_folder_unless_it_has_one() -> None:
    first, second = wiring.wired(named()), wiring.wired(named())
    own, output = wiring.wired(named(run_dir="mine")), wiring.wired(named(output_dir="out"))

    assert [(c.run_dir, c.run_name) for c in (first, second, own, output)] == [
        ("runs/tiny-model-GRPO", "tiny-model-GRPO"),
        ("runs/tiny-model-GRPO-2", "tiny-model-GRPO-2"),
        ("mine", "mine"),
        ("out", "out"),
    ]
    assert [str(c.output_dir) for c in (first, own, output)] == [
        "runs/tiny-model-GRPO/checkpoints",
        "mine/checkpoints",
        "out",
    ]


@pytest.mark.usefixtures("in_tmp")
def test_groups_of_eight_unless_told_otherwise_and_the_users_options_stay_as_they_are() -> None:
    given = named()

    assert wiring.wired(given).group_size == 8
    assert wiring.wired(named(num_generations=4)).group_size == 4
    assert given.group_size is None
    with pytest.raises(ConfigError, match="batch_size=60 is no multiple of group_size=8"):
        wiring.wired(named(batch_size=60))


def test_local_mode_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config = named(run_dir="mine")
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match="local mode is one process, not 2"):
        wiring.wired(config)


def engine_for(config: GRPOConfig, *, context_tokens: int | None = None, **inference: Any) -> Any:
    local = LocalConfig.model_validate({"inference": inference, "max_prompt_tokens": 100})
    return wiring.engine_config(wiring.wired(config), local, model="some/tiny-model", context_tokens=context_tokens)


def test_the_engine_follows_from_the_trainers_options() -> None:
    plain = engine_for(named(run_dir="mine", max_completion_length=20))

    assert plain.port == 0  # a free one
    assert engine_for(named(run_dir="mine"), port=9001).port == 9001
    assert (plain.max_model_len, plain.served_model_name, plain.lora) == (120, "some/tiny-model", False)
    assert engine_for(named(run_dir="mine"), context_tokens=64).max_model_len == 64
    assert engine_for(named(run_dir="mine"), max_model_len=512, max_num_seqs=3).max_model_len == 512
    adapter = engine_for(named(run_dir="mine", use_peft=True, lora_r=20))
    assert (adapter.lora, adapter.max_lora_rank) == (True, 32)


def test_an_engine_that_runs_already_is_not_started() -> None:
    assert engine_for(named(run_dir="mine", inference_servers=["http://gpu:9001"])) is None
    assert engine_for(named(run_dir="mine"), url="http://gpu:9001") is None


def test_an_adapter_is_asked_for_by_its_name() -> None:
    config = wiring.wired(named(run_dir="mine", use_peft=True, inference_servers=["http://gpu:9001"]))

    [server] = wiring.server_configs(config, LocalConfig())

    assert (server.base_url, server.model_name) == ("http://gpu:9001/v1", "policy")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"reward_funcs": right}, "reward_funcs is for local mode, which also needs train_dataset"),
        ({"train_dataset": ROWS}, "train_dataset is for local mode, which also needs reward_funcs"),
        ({"eval_dataset": ROWS}, "eval_dataset is for local mode, which also needs reward_funcs and train_dataset"),
        ({"reward_funcs": right, "train_dataset": []}, "train_dataset has no rows"),
        ({"reward_funcs": right, "train_dataset": ROWS, "eval_dataset": [{"text": ""}]}, "row 0 of eval_dataset"),
    ],
)
def test_what_is_missing_is_named_at_once(arguments: dict[str, Any], told: str) -> None:
    given = dict.fromkeys(("reward_funcs", "train_dataset", "eval_dataset", "reward_weights")) | arguments

    with pytest.raises(ConfigError, match=told):
        LocalMode.wanted(local=None, **given)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sampling": {"temperature": 0.7}}, r"give GRPOConfig\(temperature=0\.7\)"),
        ({"sampling": {"max_tokens": 7}}, r"give GRPOConfig\(max_completion_length=7\)"),
        ({"sampling": {"n": 2}}, r"give GRPOConfig\(num_generations=2\)"),
        ({"max_promt_tokens": 7}, "local.max_promt_tokens: .*; options of local mode: inference, max_prompt_tokens"),
    ],
)
def test_an_option_that_is_none_of_local_modes_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LocalMode(reward_funcs=right, train_dataset=ROWS, options=options)


def test_without_any_of_its_arguments_there_is_no_local_mode() -> None:
    nothing = dict.fromkeys(("reward_funcs", "train_dataset", "eval_dataset", "reward_weights"))

    assert LocalMode.wanted(local=None, **nothing) is None


# What is shown, and what is written about it


def test_the_line_shows_the_figures_of_a_step_only() -> None:
    figures = {"reward/mean": 0.25, "staleness/mean": 1.5, "completion/mean": 12.4, "time/step_s": 3.21, "loss": 0.1}

    assert figures_of(figures) == "reward 0.250  staleness 1.5  12 tokens  3.2 s/step"
    assert figures_of({"eval/reward_before": 0.3}) == ""


def rows_of_table(header: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(f"\n| {header} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_has_every_option_of_local_mode_with_its_default() -> None:
    documented = {
        name: row[1] for row in rows_of_table("option") for name in re.findall(r"`([a-z_]+)`", row[0])
    }  # fmt: skip

    assert documented.keys() == LocalConfig.model_fields.keys()
    plain = {name: field.default for name, field in LocalConfig.model_fields.items() if name != "inference"}
    assert {name: documented[name] for name in plain} == {
        name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in plain.items()
    }


def test_the_names_on_the_page_exist() -> None:
    ours = " ".join(row[1] for row in rows_of_table("TRL"))
    elsewhere = {*LocalConfig.model_fields, "inference", "gpu_memory_utilization", "reward_weights", "recipe"}
    named = set(re.findall(r"`([a-z_]+)", ours)) - elsewhere
    values = {"ppo_clip", "atropos"}

    unknown = {name for name in named - values if name not in GRPOConfig.__dataclass_fields__}

    assert len(named) > 15
    assert unknown == set()


@pytest.mark.parametrize("code", re.findall(r"```python local\n(.*?)```", PAGE, flags=re.S), ids=["short", "long"])
def test_the_examples_on_the_page_are_taken(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, *, model: str, args: GRPOConfig | None = None, **arguments: Any) -> None:
            made.append(arguments)
            LocalMode.wanted(**{"eval_dataset": None, "reward_weights": None, "local": None, **arguments})

        def train(self) -> None:
            made[-1]["is_trained"] = True

    monkeypatch.setattr("trainer.grpo_trainer.GRPOTrainer", Recorder)

    exec(compile(code, "local-mode.md", "exec"), {})

    assert made[0]["is_trained"]
    assert made[0]["reward_funcs"]
