"""load_splits: filter, cap, shuffle, split by source, with the funnel of what each stage left."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atroposlib.data import DataConfig, load_splits, register_loader
from atroposlib.data.registry import Funnel
from atroposlib.data.splitting import shuffled, split_by_hash, split_by_order
from atroposlib.errors import DataError
from tests.data.conftest import Write

QUESTIONS = [{"prompt": f"q{n}", "ground_truth": str(n)} for n in range(40)]


def prompts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_the_stages_follow_one_another(written: Write) -> None:
    rows = [{**row, "level": 1 + number % 2} for number, row in enumerate(QUESTIONS)]
    config = DataConfig(
        dataset_path=written(rows), dataset_level_filter="level_2", dataset_max_samples=10, eval_split_ratio=0.2
    )

    splits = load_splits(config)

    # Reading stops at the cap.
    expected = {"read": 20, "usable": 20, "level level_2": 10, "capped": 10, "train": 8, "eval": 2}
    assert splits.funnel == expected
    assert list(splits.funnel) == list(expected), "in order"
    assert {row["level"] for row in splits.train + splits.eval} == {2}


def test_every_row_has_what_it_needs(written: Write) -> None:
    (row,) = load_splits(DataConfig(dataset_path=written([{"question": "1+1", "answer": "2", "more": [1]}]))).train

    assert row["prompt"] == "1+1"
    assert row["ground_truth"] == "2"
    assert row["more"] == [1]
    assert isinstance(row["source_id"], str)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"ground_truth": "1"}, "line 1: .*expected a question"),
        ({"prompt": 3}, "line 1: .*expected a question|line 1: 'prompt' is int"),
        ({"prompt": [{"role": "user"}]}, "line 1: content of message 0"),
        ({"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "take the answer out"),
    ],
)
def test_a_row_without_a_question_is_named(written: Write, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        load_splits(DataConfig(dataset_path=written([row])))


def test_conversations_keep_their_columns(written: Write) -> None:
    row = {"instruction": "add 1 and 2", "output": "3"}
    (got,) = load_splits(DataConfig(dataset_path=written([row]), form="conversation")).train

    assert {**got, "source_id": None} == {**row, "source_id": None}
    with pytest.raises(DataError, match="line 1: columns 'prompt': expected"):
        load_splits(DataConfig(dataset_path=written([{"prompt": "no reply"}]), form="conversation"))


def test_the_seed_decides_the_order(written: Write) -> None:
    path = written(QUESTIONS)

    def order(**settings: Any) -> list[str]:
        return prompts(load_splits(DataConfig(dataset_path=path, eval_split_ratio=0, **settings)).train)

    assert order(shuffle=False) == prompts(QUESTIONS)
    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert sorted(order(seed=1)) == sorted(prompts(QUESTIONS))


@pytest.mark.parametrize("method", ["order", "hash"])
def test_rows_of_one_source_stay_together(written: Write, method: str) -> None:
    rows = [{"prompt": f"q{n}", "problem_id": n % 10} for n in range(60)]
    splits = load_splits(DataConfig(dataset_path=written(rows), eval_split_ratio=0.5, eval_split_method=method))

    train, held_out = ({row["source_id"] for row in part} for part in (splits.train, splits.eval))
    assert train
    assert held_out
    assert not train & held_out


def test_an_empty_evaluation_is_said_and_not_fatal(written: Write, caplog: pytest.LogCaptureFixture) -> None:
    splits = load_splits(DataConfig(dataset_path=written(QUESTIONS[:1])))

    assert splits.eval == []
    assert "evaluation is off" in caplog.text


def test_a_split_of_its_own_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: DataConfig, funnel: Funnel) -> list[dict[str, Any]]:
        funnel["read"] += 1
        return [{"prompt": config.split, "source_id": "1"}]

    monkeypatch.setattr("atroposlib.data.registry._REGISTERED", {"own": load})
    splits = load_splits(DataConfig(loader="own", val_split="test"))

    assert prompts(splits.train) == ["train"]
    assert prompts(splits.eval) == ["test"]
    assert splits.funnel == {"read": 1, "test: read": 1, "train": 1, "eval": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"val_split": "test"},
        {"dataset_split": "test"},
        {"train_split": "all"},
        {"loader": "arc_atlas", "dataset_split": "rl", "val_split": "sft"},
        {"loader": "runtime_pg", "val_split": "test"},
    ],
)
def test_what_has_no_splits_is_not_trained_on_and_evaluated_on(written: Write, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="has no split"):
        load_splits(DataConfig(dataset_path=written(QUESTIONS), **settings))


def test_no_row_at_all_is_an_error_with_the_funnel(written: Write) -> None:
    rows = [{**QUESTIONS[0], "level": 1}]

    with pytest.raises(DataError, match="read 1 -> usable 1 -> level level_9 0"):
        load_splits(DataConfig(dataset_path=written(rows), dataset_level_filter="level_9"))
    with pytest.raises(DataError, match="line 1: dataset_level_filter=level_9 needs a column level"):
        load_splits(DataConfig(dataset_path=written(QUESTIONS), dataset_level_filter="level_9"))
    with pytest.raises(DataError, match="needs dataset_path"):
        load_splits(DataConfig())


def test_columns_to_keep_are_checked(written: Write) -> None:
    path = written([{**row, "tag": 1, "junk": 2} for row in QUESTIONS])

    kept = load_splits(DataConfig(dataset_path=path, keep_columns=("prompt", "ground_truth", "source_id", "tag")))
    assert all(row.keys() == {"prompt", "ground_truth", "source_id", "tag"} for row in kept.train)
    with pytest.raises(DataError, match="drops ground_truth, source_id"):
        load_splits(DataConfig(dataset_path=path, keep_columns=("prompt",)))
    with pytest.raises(DataError, match=r"names tags; .* tag"):
        load_splits(DataConfig(dataset_path=path, keep_columns=("prompt", "ground_truth", "source_id", "tags")))


def test_a_loader_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atroposlib.data.registry._REGISTERED", {})
    register_loader("squares", lambda config, funnel: ({"prompt": f"{n}^2", "source_id": n} for n in range(9)))

    assert len(load_splits(DataConfig(loader="squares", dataset_max_samples=5)).train) == 4
    with pytest.raises(DataError, match="squares"):
        register_loader("squares", lambda config, funnel: [])
    register_loader("bare", lambda config, funnel: [{"prompt": "x"}])
    with pytest.raises(DataError, match="source_id"):
        load_splits(DataConfig(loader="bare"))


def test_a_loader_that_is_stopped_early_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    def rows() -> Any:
        try:
            for n in range(9):
                yield {"prompt": "x", "source_id": n}
        finally:
            closed.append(True)

    made = rows()

    # Still referred to, so that nobody but load_splits can close it.
    def load(config: DataConfig, funnel: Funnel) -> Any:
        return made

    monkeypatch.setattr("atroposlib.data.registry._REGISTERED", {"own": load})
    load_splits(DataConfig(loader="own", dataset_max_samples=3))

    assert closed == [True]


@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("custom_data.runtime_trace_data.get_runtime_trace_dataset", "runtime_traces"),
        ("atlas_core.data.runtime_traces.get_runtime_trace_dataset", "runtime_traces"),
        ("custom_data.runtime_postgres_data.get_postgres_runtime_dataset", "runtime_pg"),
        ("trainers.gsm8k_dataset.build_gsm8k_gkd_dataset", "math"),
        ("rows", "rows"),
    ],
)
def test_documented_names_of_loaders_are_known(name: str, loader: str) -> None:
    assert DataConfig(loader=name).loader == loader


def test_unknown_loaders_are_refused() -> None:
    with pytest.raises(DataError, match="did you mean 'runtime_traces'"):
        DataConfig(loader="runtime_trace")
    with pytest.raises(DataError, match="there is no loader"):
        DataConfig(loader="os.system.get_runtime_trace_dataset")
    with pytest.raises(DataError, match=r"loader_modules: \[os\]"):
        DataConfig(loader="os:system")
    with pytest.raises(DataError, match="cannot load the loader"):
        load_splits(DataConfig(loader="no_such_module:load", loader_modules=("no_such_module",)))


def test_a_loader_of_a_module_that_is_allowed() -> None:
    name = "atroposlib.data.loaders.rows:load"
    assert DataConfig(loader=name, loader_modules=("atroposlib.data.loaders.rows",)).loader == name


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_split_ratio": 1.0},
        {"eval_split_ratio": -0.1},
        {"dataset_max_samples": 0},
        {"val_split": "test", "eval_split_ratio": 0.2},
        {"eval_split_method": "chance"},
        {"datset_path": "x"},
        {"limit": 0},
    ],
)
def test_values_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**settings)


def test_a_configuration_never_shows_the_databases_password() -> None:
    config = DataConfig(db_url="postgresql://u:secret@h/d")

    assert "secret" not in f"{config!r} {config} {config.model_dump_json()} {config.model_dump()}"


def test_presets_are_configurations() -> None:
    assert DataConfig.preset("gsm8k_grpo", seed=7).dataset_config == "main"
    with pytest.raises(DataError, match="there are runtime_traces"):
        DataConfig.preset("gsm9k")


def test_importing_it_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'psycopg', 'pyarrow', 'fastapi', 'pandas', 'atroposlib.envs'}"
    code = f"import sys, atroposlib.data.load, atroposlib.data.chats; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert found.stdout.strip() == "[]"


sources = st.lists(st.integers(0, 12), max_size=40)


@given(sources, st.floats(0, 0.99), st.sampled_from([split_by_order, split_by_hash]))
def test_splitting_is_a_partition_by_source(rows: list[int], share: float, split: Any) -> None:
    numbered = list(enumerate(rows))
    train, held_out = split(numbered, share, lambda row: row[1])

    assert sorted(train + held_out) == numbered
    assert train == sorted(train), "in order"
    assert held_out == sorted(held_out)
    assert not {source for _, source in train} & {source for _, source in held_out}
    if share == 0:
        assert held_out == []


@given(sources, sources, st.floats(0.1, 0.9))
def test_a_hashed_split_is_stable(rows: list[int], more: list[int], share: float) -> None:
    _, held_out = split_by_hash(rows, share, lambda row: row)
    _, larger = split_by_hash([*rows, *more], share, lambda row: row)

    assert larger[: len(held_out)] == held_out


@given(sources, st.floats(0.01, 0.99))
def test_a_split_by_order_holds_out_its_share(rows: list[int], share: float) -> None:
    _, held_out = split_by_order(rows, share, lambda row: row)

    n_sources = len(set(rows))
    assert len(set(held_out)) == (max(1, int(n_sources * share)) if n_sources else 0)


@given(st.lists(st.integers()), st.integers(0, 5))
def test_shuffling_loses_nothing(rows: list[int], seed: int) -> None:
    assert sorted(shuffled(rows, seed)) == sorted(rows)
    assert shuffled(rows, seed) == shuffled(rows, seed)


def test_a_split_is_the_same_on_every_machine() -> None:
    _, held_out = split_by_hash(list(range(30)), 0.2, lambda row: row)

    assert held_out == [8, 9]
