"""Runtime traces: every documented field is read, wherever it stands; wrong types are named; three kinds of rows are made."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atroposlib.data import DataConfig, load_splits
from atroposlib.data.loaders.runtime_traces import load_runtime_traces
from atroposlib.data.traces.conversation import conversation_records, text_in
from atroposlib.data.traces.executor_prompt import SYSTEM
from atroposlib.data.traces.records import flat_records, rl_records
from atroposlib.data.traces.session import session_of
from atroposlib.errors import DataError
from tests.data.conftest import Write
from tests.data.sessions import a_session, a_step, of_metadata

RL_COLUMNS = {
    *(
        "prompt",
        "task",
        "plan",
        "step_id",
        "step_description",
        "guidance_history",
        "step_context",
        "validation",
        "tool",
    ),
    *("tool_params", "reward_breakdown", "reward_score", "step_output", "step_trace", "session_metadata"),
    *("session_reward", "learning_history", "student_learning", "teacher_learning", "trajectory_events"),
    *("adaptive_summary", "runtime", "artifacts", "attempt_history", "ground_truth", "source_id"),
    *("triage_dossier", "reward_summary", "review_status", "personas_used", "persona_updates"),
}


def rows(path: Path, **over: Any) -> list[dict[str, Any]]:
    config = DataConfig.preset("runtime_traces", dataset_path=path, eval_split_ratio=0, shuffle=False, **over)
    train: list[dict[str, Any]] = load_splits(config).train
    return train


def test_a_session_with_every_field() -> None:
    session = session_of(a_session())

    assert session.session_id == "7"
    assert session.score == 0.9
    assert (session.learning_key, session.status, session.execution_mode) == ("sums", "succeeded", "coach")
    assert session.review_status == "approved"
    assert session.triage_dossier is not None
    assert session.created is not None
    assert session.created.year == 2026
    (step,) = session.steps
    assert step.reward is not None
    assert step.reward.breakdown["raw"] == a_step()["evaluation"], "raw is the whole object"
    assert step.reward.judges[0]["identifier"] == "accuracy"
    assert (step.tool, step.attempts, step.deliverable, step.runtime) == ("calculator", 2, {"sum": 3}, {"ms": 12})


@pytest.mark.parametrize("name", ["review_status", "triage_dossier", "reward_summary", "personas_used", "learning_key"])
def test_fields_are_found_at_the_top_and_in_the_metadata(name: str) -> None:
    value: Any = {"review_status": "approved", "learning_key": "k", "personas_used": ["p"]}.get(name, {"score": 0.5})

    top = session_of({"task": "t", name: value, "session_metadata": {}})
    below = session_of({"task": "t", "session_metadata": {name: value}})
    both = session_of({"task": "t", name: value, "session_metadata": {name: None}})

    assert getattr(top, name) == getattr(below, name) == getattr(both, name) == value


def test_what_older_and_other_writers_do_is_understood() -> None:
    session = session_of(
        {
            "task": "t",
            "reward": '{"score": 0.5}',
            "session_metadata": '{"id": 3, "drift": {"drift_alert": true}}',
            "steps": [
                {
                    "id": "s1",
                    "tool_params": '{"name": "calculator"}',
                    "prior_results": "not JSON",
                    "runtime": 12,
                    "new": 1,
                },
                {"reward": 0.25, "context_outputs": '{"a": 1}', "metadata": {"new": 2}, "new": 1, "output": None},
            ],
        }
    )
    first, second = session.steps

    assert session.score == 0.5
    assert session.session_id == "3"
    assert (first.step_id, first.tool, first.runtime, first.metadata) == ("s1", "calculator", 12.0, {"new": 1})
    assert first.context == {"raw": "not JSON"}
    assert second.reward is not None
    assert (second.reward.score, second.context, second.attempts) == (0.25, {"a": 1}, 1)
    assert second.metadata == {"new": 2}, "what stands under metadata wins"


def test_runs_of_one_task_without_ids_are_one_source() -> None:
    assert session_of({"task": "a"}).session_id == session_of({"task": "a", "steps": []}).session_id
    assert session_of({"task": "a"}).session_id != session_of({"task": "b"}).session_id


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, r"task is None; expected the user's request \(fields: none\)"),
        ({"task": "  "}, "task is '  '"),
        ({"task": 3}, "task is 3; expected text"),
        ({"task": "t", "final_answer": [1]}, r"final_answer is \[1\]; expected text"),
        ({"task": "t", "steps": {"a": 1}}, "steps is .*; expected a list"),
        ({"task": "t", "steps": ["a"]}, r"steps\[0\] is 'a'; expected dict"),
        ({"task": "t", "plan": "do it"}, "plan is 'do it'; expected an object"),
        ({"task": "t", "session_metadata": []}, r"session_metadata is \[\]"),
        ({"task": "t", "session_reward": "great"}, "session_reward is 'great'; expected an object with a score"),
        (
            {"task": "t", "session_reward": {"score": "high"}},
            "session_reward.score is 'high'; expected a finite number",
        ),
        ({"task": "t", "session_reward": {"score": float("nan")}}, "session_reward.score is nan"),
        ({"task": "t", "session_reward": {"score": True}}, "session_reward.score is True"),
        ({"task": "t", "trajectory_events": [1]}, r"trajectory_events\[0\] is 1"),
        ({"task": "t", "review_status": 1}, "review_status is 1; expected text"),
        ({"task": "t", "steps": [{}, a_step(attempts="2")]}, r"steps\[1\].attempts is '2'; expected a whole number"),
        ({"task": "t", "steps": [a_step(guidance=[{"note": 1}])]}, r"steps\[0\].guidance\[0\] is .*; expected str"),
        ({"task": "t", "steps": [a_step(tool_params="{")]}, r"steps\[0\].tool_params is '{'; expected an object"),
        ({"task": "t", "steps": [a_step(step_id=1.5)]}, r"steps\[0\].step_id is 1.5; expected a number or text"),
        (
            {"task": "t", "steps": [a_step(evaluation={"judges": [{"samples": [{"score": "x"}]}]})]},
            r"steps\[0\].evaluation.judges\[0\].samples\[0\].score is 'x'",
        ),
    ],
)
def test_a_field_of_a_wrong_type_is_named(written: Write, row: dict[str, Any], complaint: str) -> None:
    path = written([a_session(), row])

    with pytest.raises(DataError, match=f"line 2: {complaint}"):
        rows(path)
    assert len(rows(path, on_bad_line="skip")) == 1


@pytest.mark.parametrize(("ending", "packed"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_sessions_come_from_plain_and_compressed_files(tmp_path: Path, ending: str, packed: Any) -> None:
    path = tmp_path / f"export.jsonl{ending}"
    path.write_bytes(packed(json.dumps(a_session()).encode() + b"\n\n"))

    assert [session.task for session in load_runtime_traces(path)] == ["sum 1 and 2"]
    assert len(rows(path)) == 1


def test_half_a_line_is_named(written: Write) -> None:
    path = written(json.dumps(a_session()) + "\n" + json.dumps(a_session())[:100])

    with pytest.raises(DataError, match=r"line 2: not JSON.*was the file cut"):
        list(load_runtime_traces(path))


def test_an_rl_row_has_every_column() -> None:
    (row,) = rl_records(session_of(a_session()))

    assert row.keys() >= RL_COLUMNS
    assert row["ground_truth"] == "3", "the step's before the session's"
    assert row["guidance_history"] == ["look at the sign"]
    assert (row["reward_score"], row["session_reward"]) == (0.75, 0.9)
    assert json.loads(row["triage_dossier"])["tags"] == ["math"]
    assert json.loads(row["attempt_history"]) == [{"attempt": 1}]
    # One type a column, whatever the map holds.
    assert all(value is None or isinstance(value, (str, float, list)) for value in row.values())


def test_ground_truth_is_the_sessions_or_absent() -> None:
    of_session = rl_records(session_of(a_session(steps=[a_step(metadata={})])))
    nobody = rl_records(session_of({"task": "t", "steps": [{}]}))

    assert of_session[0]["ground_truth"] == "three"
    assert "ground_truth" not in nobody[0]


def test_the_executors_prompt_tells_everything_and_not_the_outcome() -> None:
    (row,) = rl_records(
        session_of(a_session(steps=[a_step(output="OUTCOME", trace="TRACE", tool=None, tool_params=None)]))
    )

    system, empty, *lines = row["prompt"].split("\n")
    assert (system, empty) == ("You add.", "")
    assert lines == [
        "Task: sum 1 and 2",
        "Step: 1",
        "Description: add the numbers",
        "Tool: none",
        "Tool parameters: {}",
        'Context: {"0": "the numbers are 1 and 2"}',
        'Guidance so far: ["look at the sign"]',
        'Previous validation: {"valid": true, "rationale": "fine"}',
    ]
    assert rl_records(session_of({"task": "t", "steps": [{}]}))[0]["prompt"].startswith(f"{SYSTEM}\n\nTask: t\n")
    of_step = a_session(steps=[a_step(metadata={"executor_system_prompt": "You are quick."})])
    assert rl_records(session_of(of_step))[0]["prompt"].startswith("You are quick.\n\n")


def test_a_flat_row_has_the_outcome(written: Write) -> None:
    (row,) = flat_records(session_of(a_session()))

    assert (row["final_answer"], row["attempts"]) == ("3", 2)
    assert json.loads(row["step_metadata"])["ground_truth"] == "3"
    assert rows(written([a_session()]), form="flat") == [row]


def test_a_conversation_ends_in_the_teachers_turn() -> None:
    (row,) = conversation_records(session_of(a_session()), every_teacher_turn=False)

    assert row["messages"] == [
        {"role": "system", "content": "sum 1 and 2\n\nPlan:\n1. add the numbers"},
        {"role": "user", "content": "is it 4?"},
        {"role": "assistant", "content": "count again"},
    ]
    assert row["completion_text"] == "count again"
    assert row["prompt_text"].endswith("user: is it 4?")
    assert (row["session_id"], row["source_id"], row["learning_key"], row["reward"]) == ("7", "7", "sums", 0.9)
    assert row["metadata"]["student_learning"] == "count twice"


@pytest.mark.parametrize(
    ("over", "ground_truth"),
    [
        ({"session_metadata": {"ground_truth": "4", "status": "failed"}}, "4"),
        ({"session_metadata": {"status": "succeeded"}}, "3"),
        ({"session_metadata": {"status": "succeeded"}, "final_answer": "I add.\nFinal Answer: 3."}, "3"),
        ({"session_metadata": {"status": "succeeded"}, "final_answer": "I add\nthem."}, None),
        ({"session_metadata": {"status": "succeeded"}, "final_answer": " "}, None),
        ({"session_metadata": {"status": "failed"}}, None),
    ],
)
def test_a_conversation_says_what_is_right_where_its_session_does(over: dict[str, Any], ground_truth: Any) -> None:
    (row,) = conversation_records(session_of(a_session(**over)), every_teacher_turn=False)

    assert row.get("ground_truth") == ground_truth
    assert ("ground_truth" in row) is (ground_truth is not None)
    assert row["task"] == "sum 1 and 2"


def test_every_turn_of_the_teacher_can_be_an_example() -> None:
    events = [{"actor": actor, "text": text} for actor, text in [("student", "1"), ("Teacher", "2"), ("coach", "3")]]
    records = conversation_records(session_of(a_session(trajectory_events=events)), every_teacher_turn=True)

    assert [row["completion_text"] for row in records] == ["2", "3"]
    assert [message["content"] for message in records[1]["messages"][1:]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("actor", "role"),
    [
        ("executor", "user"),
        ("runtime_student", "user"),
        ("atlas_teacher", "assistant"),
        ("runtime", "system"),
        ("telemetry", None),
    ],
)
def test_actors_have_roles(actor: str, role: str | None) -> None:
    events = [{"actor": actor, "text": "said"}, {"actor": "teacher", "text": "end"}]
    (row,) = conversation_records(session_of(a_session(trajectory_events=events)), every_teacher_turn=False)

    assert [message["role"] for message in row["messages"][1:-1]] == ([role] if role else [])


def test_without_events_steps_make_the_conversation() -> None:
    steps = [a_step(), a_step(output=" ", trace="second trace", guidance=["then this", "and that"])]
    (row,) = conversation_records(session_of(a_session(trajectory_events=None, steps=steps)), every_teacher_turn=False)

    assert [message["content"] for message in row["messages"][1:]] == [
        "look at the sign", "3", "then this", "and that",
    ]  # fmt: skip


def test_sessions_in_which_no_teacher_speaks_are_left_out(written: Write) -> None:
    mute = a_session(trajectory_events=[{"actor": "student", "text": "hm"}], steps=[])
    config = DataConfig.preset("runtime_traces", dataset_path=written([mute, a_session()]), form="conversation")

    assert load_splits(config).funnel["sessions with rows"] == 1


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"text": " a "}, "a"),
        ({"text": "", "content": "b"}, "b"),
        ({"payload": {"id": "x", "guidance": "c"}}, "c"),
        ({"payload": {"items": [{"message": ["d"]}]}}, "d"),
        ({"content": [{"type": "text", "text": "e"}]}, "e"),
        ({"type": "t", "payload": {"tags": ["no", "text"]}}, None),
        ({}, None),
    ],
)
def test_the_text_of_an_event_is_found(event: dict[str, Any], text: str | None) -> None:
    assert text_in(event) == text


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, ["a", "b", "c", "d"]),
        ({"min_reward": 0.5}, ["b", "c"]),
        ({"max_reward": 0.5}, ["a", "b"]),
        ({"min_reward": -1.0}, ["a", "b", "c", "d"]),
        ({"status_filters": ("succeeded",)}, ["a", "b"]),
        ({"review_status_filters": ("approved", "pending")}, ["a", "c"]),
        ({"learning_key": "k"}, ["b"]),
        ({"start_date": "2026-01-02"}, ["b", "c"]),
        ({"end_date": "2026-01-02T00:00:00+00:00"}, ["a"]),
        ({"status_filters": ("succeeded",), "min_reward": 0.5}, ["b"]),
        ({"dataset_max_sessions": 2}, ["a", "b"]),
    ],
)
def test_sessions_are_filtered(written: Write, settings: dict[str, Any], left: list[str]) -> None:
    metadata = [
        {"status": "succeeded", "review_status": "approved", "created_at": "2026-01-01"},
        {"status": "succeeded", "learning_key": "k", "created_at": "2026-01-02T00:00:00Z"},
        {"status": "failed", "review_status": "pending", "created_at": "2026-01-03T01:00:00+02:00"},
        {"created_at": "yesterday"},
    ]
    scores = [0.0, 0.5, 0.9, None]
    lines = [
        {"task": task, "session_reward": {"score": score}, "session_metadata": found, "steps": [{}, {}]}
        for task, score, found in zip("abcd", scores, metadata, strict=True)
    ]
    got = rows(written(lines), **settings)

    assert [row["task"] for row in got] == [task for task in left for _ in range(2)]


def test_the_funnel_tells_where_sessions_went(written: Write) -> None:
    lines = [a_session(), of_metadata(status="failed"), a_session(session_reward={"score": 0.1})]
    config = DataConfig.preset(
        "runtime_traces", dataset_path=written(lines), status_filters=("succeeded",), min_reward=0.5, eval_split_ratio=0
    )

    assert list(load_splits(config).funnel.items()) == [
        ("read", 3), ("usable", 3), ("status succeeded", 2), ("reward >= 0.5", 1),
        ("sessions with rows", 1), ("rows", 1), ("train", 1), ("eval", 0),
    ]  # fmt: skip


def test_one_session_never_straddles_the_split(written: Write) -> None:
    lines = [a_session(steps=[a_step(), a_step()], session_metadata={"id": n}) for n in range(10)]
    splits = load_splits(DataConfig.preset("runtime_traces", dataset_path=written(lines), eval_split_ratio=0.3))

    assert len(splits.eval) == 6
    assert not {row["source_id"] for row in splits.train} & {row["source_id"] for row in splits.eval}


def test_traces_of_no_file_are_refused() -> None:
    with pytest.raises(DataError, match="needs dataset_path"):
        load_splits(DataConfig.preset("runtime_traces"))
    with pytest.raises(DataError, match="runtime_traces needs dataset_path: a file of sessions"):
        load_splits(DataConfig.preset("runtime_traces", dataset_id_or_path="owner/name"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


@given(
    over=st.dictionaries(st.sampled_from(sorted(a_session())), json_values, max_size=3),
    of_step=st.dictionaries(st.sampled_from(sorted(a_step())), json_values, max_size=3),
    of_session=st.dictionaries(st.sampled_from(sorted(a_session()["session_metadata"])), json_values, max_size=2),
)
@settings(max_examples=100)
def test_garbage_in_any_field_raises_nothing_but_data_errors(
    over: dict[str, Any], of_step: dict[str, Any], of_session: dict[str, Any]
) -> None:
    metadata = {**a_session()["session_metadata"], **of_session}
    line = {**a_session(steps=[a_step(**of_step)], session_metadata=metadata), **over}
    try:
        session = session_of(line)
        made = [*rl_records(session), *flat_records(session), *conversation_records(session, every_teacher_turn=True)]
    except DataError:
        return
    assert session.raw == line or "nan" in repr(line), "nothing is dropped"
    assert all(isinstance(row["source_id"], str) for row in made)
    assert session.created is None or session.created.tzinfo is not None


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4).filter(lambda name: name not in a_step()), st.integers(), max_size=3
    )
)
def test_unknown_keys_are_kept(unknown: dict[str, int]) -> None:
    session = session_of({**{f"x_{name}": value for name, value in unknown.items()}, "task": "t", "steps": [unknown]})

    assert {name: session.raw[f"x_{name}"] for name in unknown} == unknown
    known = ("id", "reward", "prior_results", "context_outputs")
    assert session.steps[0].metadata == {name: value for name, value in unknown.items() if name not in known}
