"""Traces from a real Postgres: the same rows as from files, read without changing anything, with a deadline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from atroposlib.data import DataConfig, load_splits
from atroposlib.data.postgres import reader
from atroposlib.data.postgres.reader import database
from atroposlib.errors import DataError
from tests.data.conftest import Write
from tests.data.postgres_server import PASSWORD, QUOTED_PASSWORD, PostgresProcess
from tests.data.sessions import a_session, a_step

SCHEMA = (Path(__file__).parent / "runtime_schema.sql").read_text(encoding="utf-8")
EVENTS = a_session()["trajectory_events"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresProcess]:
    server = PostgresProcess()
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Tables:
    """Writes sessions as the runtime does."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def insert(self, table: str, **row: Any) -> None:
        values = [json.dumps(value) if isinstance(value, (dict, list)) else value for value in row.values()]
        places = ", ".join(["%s"] * len(row))
        self.connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", values)

    def add(self, number: int, *, steps: int = 1, score: float | None = 0.9, **columns: Any) -> None:
        reward = {} if score is None else {"reward": {"score": score}, "reward_stats": {"score": score}}
        made = {"created_at": f"2026-01-{number:02d}T00:00:00Z", "status": "succeeded", "metadata": {}}
        self.insert("sessions", id=number, **{"task": f"task {number}", **made, **reward, **columns})
        self.insert("plans", session_id=number, plan={"steps": [{"id": 1, "description": "add", "tool": "calculator"}]})
        for step in range(1, steps + 1):
            of_step = {"session_id": number, "step_id": step}
            self.insert("step_results", **of_step, trace="t", output="3", evaluation={"score": 0.5}, attempts=2,
                        metadata={"ground_truth": "3", "artifacts": {"a": 1}})  # fmt: skip
            self.insert("step_attempts", **of_step, attempt=1, evaluation={"score": 0.1})
            self.insert("guidance_notes", **of_step, sequence=1, note="second")
            self.insert("guidance_notes", **of_step, sequence=0, note="first")
        for event in EVENTS:
            self.insert("trajectory_events", session_id=number, event=event)


@pytest.fixture
def tables(postgres: PostgresProcess) -> Iterator[Tables]:
    """An empty database."""
    with import_module("psycopg").connect(postgres.url(), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        connection.execute(SCHEMA)
        yield Tables(connection)


def config_of(postgres: PostgresProcess, **over: Any) -> DataConfig:
    return DataConfig.preset(
        "runtime_pg", **{"db_url": postgres.url(), "shuffle": False, "eval_split_ratio": 0, **over}
    )


def tasks(config: DataConfig) -> list[str]:
    return [row["task"].removeprefix("task ") for row in load_splits(config).train]


def test_a_session_is_whole(postgres: PostgresProcess, tables: Tables) -> None:
    tables.add(1, metadata={"learning_key": "k", "domain": "sums"}, final_answer="3", student_learning="mine")
    tables.insert("learning_registry", learning_key="k", student_learning="all's", teacher_learning="teach")

    (row,) = load_splits(config_of(postgres, form="rl")).train

    assert row["source_id"] == "1"
    assert row["step_description"] == "add", "of the plan"
    assert row["tool"] == "calculator"
    assert row["guidance_history"] == ["first", "second"]
    assert row["ground_truth"] == "3"
    assert json.loads(row["artifacts"]) == {"a": 1}
    assert json.loads(row["attempt_history"]) == [{"attempt": 1, "evaluation": {"score": 0.1}}]
    assert (row["reward_score"], row["session_reward"]) == (0.5, 0.9)
    assert (row["student_learning"], row["teacher_learning"]) == ("mine", "teach")
    assert json.loads(row["session_metadata"])["created_at"].startswith("2026-01-01T00:00:00")
    assert json.loads(row["trajectory_events"]) == EVENTS


def test_conversations_are_the_same_as_those_of_a_file(
    postgres: PostgresProcess, tables: Tables, written: Write
) -> None:
    tables.add(1, metadata={"learning_key": "k"})
    line = {
        "task": "task 1",
        "plan": {"steps": [{"id": 1, "description": "add"}]},
        "session_reward": {"score": 0.9},
        "trajectory_events": EVENTS,
        "session_metadata": {"id": 1, "learning_key": "k", "status": "succeeded"},
    }
    of_file = DataConfig(loader="runtime_traces", form="conversation", dataset_path=written([line]))

    (mine,), (its,) = load_splits(config_of(postgres)).train, load_splits(of_file).train

    assert {**mine, "metadata": None} == {**its, "metadata": None}
    assert mine["metadata"]["created_at"].startswith("2026-01-01")


def test_events_and_learning_can_be_left_out(postgres: PostgresProcess, tables: Tables) -> None:
    tables.add(1, student_learning="mine")
    config = config_of(postgres, include_trajectory_events=False, include_learning_data=False)

    (row,) = load_splits(config).train

    assert [message["content"] for message in row["messages"][1:]] == ["first", "second"], "of the steps"
    assert row["metadata"]["student_learning"] is None


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, "4321"),
        ({"min_reward": 0.5}, "32"),
        ({"max_reward": 0.5}, "21"),
        ({"min_reward": -1.0}, "4321"),
        ({"status_filters": ("succeeded",)}, "21"),
        ({"status_filters": ("succeeded", "failed")}, "321"),
        ({"review_status_filters": ("approved",)}, "1"),
        ({"learning_key": "k'; DROP TABLE sessions; --"}, "2"),
        ({"start_date": "2026-01-02", "end_date": "2026-01-04T00:00:00Z"}, "32"),
        ({"limit": 2}, "43"),
        ({"limit": 2, "offset": 1}, "32"),
        ({"dataset_max_sessions": 1}, "4"),
        ({"status_filters": ("succeeded",), "min_reward": 0.5}, "2"),
    ],
)
def test_filters_are_those_of_files(
    postgres: PostgresProcess, tables: Tables, written: Write, settings: dict[str, Any], left: str
) -> None:
    tables.add(1, score=0.0, review_status="approved")
    tables.add(2, score=0.5, metadata={"learning_key": "k'; DROP TABLE sessions; --"})
    tables.add(3, score=0.9, status="failed")
    tables.add(4, score=None, status="running")
    with database(config_of(postgres)) as opened:
        lines = list(opened.sessions())

    assert tasks(config_of(postgres, form="rl", **settings)) == list(left)
    if not {"limit", "offset"} & settings.keys():
        path = written(lines)
        of_file = DataConfig(loader="runtime_traces", dataset_path=path, shuffle=False, eval_split_ratio=0, **settings)
        assert tasks(of_file) == list(left), "exported and filtered again"


def test_the_funnel_counts_what_each_filter_leaves(postgres: PostgresProcess, tables: Tables) -> None:
    for number in range(1, 6):
        tables.add(number, score=number / 10, status="failed" if number == 5 else "succeeded")

    splits = load_splits(
        config_of(postgres, status_filters=("succeeded",), min_reward=0.2, limit=2, eval_split_ratio=0.5)
    )

    assert list(splits.funnel.items()) == [
        ("sessions", 5), ("status succeeded", 4), ("reward >= 0.2", 3), ("selected", 2), ("usable", 2),
        ("sessions with rows", 2), ("rows", 2), ("train", 1), ("eval", 1),
    ]  # fmt: skip


def test_no_session_says_which_filter_took_them(postgres: PostgresProcess, tables: Tables) -> None:
    tables.add(1, score=0.1)

    with pytest.raises(DataError, match=r"sessions 1 -> reward >= 0.8 0 -> selected 0"):
        load_splits(config_of(postgres, min_reward=0.8))


def test_pages_follow_one_another(postgres: PostgresProcess, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PAGE", 2)
    for number in range(1, 6):
        tables.add(number, steps=number)

    got = tasks(config_of(postgres, form="rl"))

    assert got == [str(number) for number in (5, 4, 3, 2, 1) for _ in range(number)]


def test_sessions_that_come_meanwhile_shift_nothing(
    postgres: PostgresProcess, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PAGE", 1)
    for number in (1, 2):
        tables.add(number)

    with database(config_of(postgres)) as opened:
        sessions = opened.sessions()
        first = next(sessions)
        tables.add(9)
        tables.connection.execute("DELETE FROM sessions WHERE id = 1")
        rest = list(sessions)

    assert [row["task"] for row in (first, *rest)] == ["task 2", "task 1"]
    assert [len(row["steps"]) for row in rest] == [1], "its steps too are those of the beginning"


def test_the_cap_of_rows_ends_the_reading(
    postgres: PostgresProcess, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PAGE", 1)
    for number in range(1, 6):
        tables.add(number)

    splits = load_splits(config_of(postgres, dataset_max_samples=2))

    assert splits.funnel["selected"] == 2
    (n_others,) = tables.connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND state <> 'idle' "
        "AND pid <> pg_backend_pid()"
    ).fetchone()
    assert n_others == 0, "the transaction is over"


def test_one_session_by_its_id(postgres: PostgresProcess, tables: Tables) -> None:
    tables.add(3, status="failed")

    with database(config_of(postgres, status_filters=("succeeded",))) as opened:
        found, missing = opened.session(3), opened.session(4)

    assert found is not None
    assert found["task"] == "task 3"
    assert missing is None


def test_nothing_can_be_written(postgres: PostgresProcess, tables: Tables) -> None:
    with pytest.raises(DataError, match="read-only transaction"), database(config_of(postgres)) as opened:
        opened._connection.execute("INSERT INTO sessions (task) VALUES ('x')")


def test_a_statement_has_a_deadline(postgres: PostgresProcess, tables: Tables) -> None:
    config = config_of(postgres, statement_timeout_s=0.05)

    with pytest.raises(DataError, match=r"statement timeout.*raise statement_timeout_s"), database(config) as opened:
        opened._connection.execute("SELECT pg_sleep(20)")


def test_another_database_is_named(postgres: PostgresProcess, tables: Tables) -> None:
    tables.connection.execute("DROP TABLE sessions CASCADE")

    with pytest.raises(DataError, match=r"sessions.*is this the runtime's database"):
        load_splits(config_of(postgres))


def test_a_session_that_cannot_be_used_is_named_or_left_out(postgres: PostgresProcess, tables: Tables) -> None:
    tables.add(1)
    tables.add(2, task="  ")

    with pytest.raises(DataError, match="session 2: task is '  '"):
        load_splits(config_of(postgres))
    assert tasks(config_of(postgres, form="rl", on_bad_line="skip")) == ["1"]
    with pytest.raises(DataError, match="needs a file"):
        load_splits(config_of(postgres, on_bad_line="quarantine"))


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace(QUOTED_PASSWORD, f"{QUOTED_PASSWORD}x"),
        lambda url: url.replace("127.0.0.1", "127.0.0.1.invalid"),
        lambda url: url.replace(QUOTED_PASSWORD, "s3cret%zz"),
        lambda url: f"{url}?nonsense=1",
    ],
    ids=["password", "host", "encoding", "option"],
)
def test_a_database_that_refuses_is_named_without_its_password(postgres: PostgresProcess, change: Any) -> None:
    with pytest.raises(DataError, match=r"postgresql://reader@127.0.0.1") as caught:
        load_splits(config_of(postgres, db_url=change(postgres.url())))

    assert caught.value.__cause__ is None
    assert not any(secret in str(caught.value) for secret in (PASSWORD, QUOTED_PASSWORD, "s3cret"))


def test_the_url_may_stand_in_a_variable(
    postgres: PostgresProcess, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.add(1)
    monkeypatch.delenv("ATLAS_DB_URL", raising=False)
    monkeypatch.setenv("ATLAS_DATABASE_URL", postgres.url())

    assert len(load_splits(config_of(postgres, db_url=None)).train) == 1


def test_every_documented_field_survives_the_database(postgres: PostgresProcess, tables: Tables) -> None:
    step, session = a_step(), a_session()
    metadata = {**session["session_metadata"], "triage_dossier": session["triage_dossier"]}
    tables.insert("sessions", id=1, task=session["task"], status="succeeded", metadata=metadata,
                  reward=session["session_reward"], reward_stats=session["reward_summary"], review_status="approved")  # fmt: skip
    columns = {name: step[name] for name in ("step_id", "trace", "output", "evaluation", "attempts")}
    rest = {name: value for name, value in step.items() if name not in {*columns, "guidance", "metadata"}}
    tables.insert("step_results", session_id=1, **columns, metadata={**rest, **step["metadata"]})

    (row,) = load_splits(config_of(postgres, form="rl")).train

    assert row["step_description"] == step["description"]
    assert json.loads(row["tool_params"]) == step["tool_params"]
    assert json.loads(row["validation"]) == step["validation"]
    assert json.loads(row["step_context"]) == step["context"]
    assert json.loads(row["triage_dossier"]) == session["triage_dossier"]
    assert row["review_status"] == "approved"
