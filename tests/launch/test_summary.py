"""The account of a run: what counts as trained, lost, repeated, waiting and retired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.launch.jsonl import JsonlTail, read_jsonl, surviving_history
from atroposlib.launch.run_folder import RunFolder
from atroposlib.launch.summary import account, max_staleness_seen, overlap, restarts, summarise, summary_table, wall_s
from atroposlib.wire.models import GroupRecord


def delivered(*group_ids: str, sequences: int = 4) -> list[dict[str, Any]]:
    return [{"group_id": group_id, "sequences": sequences} for group_id in group_ids]


def step(number: int, *group_ids: str, sequences: int = 4) -> dict[str, Any]:
    return {"step": number, "groups": list(group_ids), "sequences": sequences * len(group_ids), "max_staleness": 0}


def record(group_id: str, state: Any, *, at_step: int | None = None, reason: str | None = None) -> GroupRecord:
    return GroupRecord(
        group_id=group_id,
        env_id=0,
        n_sequences=4,
        n_tokens=40,
        state=state,
        step=at_step,
        oldest_version=0,
        reason=reason,
    )


def test_a_group_delivered_and_trained_once_is_in_order() -> None:
    result = account(delivered("a", "b"), [step(0, "a"), step(1, "b")], [])

    assert (result.sequences_trained, result.sequences_lost, result.sequences_repeated) == (8, 0, 0)


def test_a_delivered_group_that_nobody_knows_is_lost() -> None:
    result = account(delivered("a", "b"), [step(0, "a")], [record("a", "batched", at_step=0)])

    assert result.sequences_lost == 4
    assert result.lost_group_ids == ["b"]


def test_a_group_batched_for_a_step_that_was_trained_without_it_is_lost() -> None:
    result = account(delivered("a", "b"), [step(0, "a")], [record("b", "batched", at_step=0)])

    assert result.lost_group_ids == ["b"]


def test_a_group_in_the_queue_or_in_a_batch_of_a_later_step_waits() -> None:
    server = [record("b", "queued"), record("c", "batched", at_step=1)]

    result = account(delivered("a", "b", "c"), [step(0, "a")], server)

    assert (result.sequences_lost, result.sequences_waiting) == (0, 8)


def test_a_retired_group_counts_under_its_reason_and_is_lost_without_one() -> None:
    server = [record("a", "retired", reason="too_stale"), record("b", "retired")]

    result = account(delivered("a", "b"), [], server)

    assert result.sequences_retired == {"too_stale": 4}
    assert result.lost_group_ids == ["b"]


def test_a_group_trained_in_two_surviving_steps_is_repeated() -> None:
    result = account(delivered("a"), [step(0, "a"), step(1, "a")], [])

    assert (result.sequences_repeated, result.repeated_group_ids) == (4, ["a"])


def test_a_group_twice_in_one_step_is_repeated() -> None:
    result = account(delivered("a"), [step(0, "a", "a")], [])

    assert result.sequences_repeated == 4


def test_steps_that_a_resumed_trainer_took_again_count_once() -> None:
    trained = [step(0, "a"), step(1, "b"), step(2, "c"), step(1, "b"), step(2, "c")]

    result = account(delivered("a", "b", "c"), trained, [])

    assert (result.sequences_trained, result.sequences_lost, result.sequences_repeated) == (12, 0, 0)


def test_a_resumed_trainer_that_gets_another_batch_loses_the_first_one() -> None:
    result = account(delivered("a", "b"), [step(0, "a"), step(0, "b")], [record("a", "batched", at_step=0)])

    assert result.lost_group_ids == ["a"]


def test_a_delivery_noted_twice_is_one_group() -> None:
    result = account(delivered("a", "a"), [step(0, "a")], [])

    assert (result.sequences_trained, result.sequences_lost) == (4, 0)


def test_a_trained_group_that_no_environment_noted_is_told_apart() -> None:
    result = account([], [step(0, "a")], [record("a", "batched", at_step=0)])

    assert (result.sequences_unledgered, result.sequences_lost) == (4, 0)


def test_without_the_servers_records_nothing_is_excused() -> None:
    assert account(delivered("a"), [], None).sequences_lost == 4


@given(st.lists(st.sampled_from(["trained", "queued", "retired", "lost"]), max_size=20))
def test_every_delivered_sequence_is_in_exactly_one_place(fates: list[str]) -> None:
    ids = [f"g{i}" for i in range(len(fates))]
    trained = [step(i, ids[i]) for i, fate in enumerate(fates) if fate == "trained"]
    server = [record(ids[i], "queued") for i, fate in enumerate(fates) if fate == "queued"]
    server += [record(ids[i], "retired", reason="old") for i, fate in enumerate(fates) if fate == "retired"]

    result = account(delivered(*ids), trained, server)

    retired = sum(result.sequences_retired.values())
    places = (result.sequences_trained, result.sequences_waiting, retired, result.sequences_lost)
    assert places == tuple(4 * fates.count(fate) for fate in ("trained", "queued", "retired", "lost"))


def test_the_surviving_history_forgets_all_that_followed_a_step_taken_again() -> None:
    lines = [{"step": 0, "n": 1}, {"step": 1, "n": 2}, {"step": 2, "n": 3}, {"step": 1, "n": 4}]

    assert [line["n"] for line in surviving_history(lines)] == [1, 4]


def test_a_line_cut_off_by_a_kill_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "gro\n{"step": 2}\n{"st')

    assert [line["step"] for line in read_jsonl(path)] == [0, 2]


def test_a_tail_hands_out_each_line_once_and_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    tail = JsonlTail(path)
    assert tail.new_lines() == []
    path.write_text('{"step": 0}\n{"step"')
    assert tail.new_lines() == [{"step": 0}]
    path.write_text('{"step": 0}\n{"step": 1}\n')
    assert tail.new_lines() == [{"step": 1}]


def test_staleness_counts_steps_that_did_not_survive() -> None:
    trained = [{"step": 0, "max_staleness": 3}, {"step": 0, "max_staleness": 1}]

    assert max_staleness_seen(trained, [{"step": 0, "staleness/max": 2.0}]) == 3
    assert max_staleness_seen([], []) is None


def test_restarts_count_deaths_but_not_ordered_restarts() -> None:
    events = [
        {"event": "started", "process": "trainer"},
        {"event": "died", "process": "trainer"},
        {"event": "restart_ordered", "process": "inference"},
    ]

    assert restarts(events) == {"trainer": 1, "inference": 0}


def test_wall_time_adds_up_sessions_and_leaves_out_the_pause_between() -> None:
    events = [
        {"time": 0.0, "event": "session_started"},
        {"time": 5.0, "event": "started"},
        {"time": 100.0, "event": "session_started"},
        {"time": 110.0, "event": "session_ended"},
    ]

    assert wall_s(events) == 15.0


def test_overlap_compares_wall_time_with_both_busy_times() -> None:
    metrics = [
        {"time": 20.0, "time/step_s": 10.0, "time/train_s": 7.0, "time/sync_s": 1.0},
        {"time": 30.0, "time/step_s": 10.0, "time/train_s": 8.0, "time/sync_s": 1.0},
    ]
    in_flight = {2.0: 8, 12.0: 8, 16.0: 8, 18.0: 0, 24.0: 3, 40.0: 0}
    env = [{"time": at, "env": "a", "env/requests_in_flight": count} for at, count in in_flight.items()]

    result = overlap(metrics, env)

    assert result is not None
    assert (result.wall_s, result.sampling_busy_s, result.training_busy_s, result.sum_s) == (20.0, 12.0, 17.0, 29.0)


def test_two_environments_that_sample_at_once_are_busy_once() -> None:
    metrics = [{"time": 10.0, "time/step_s": 10.0}]
    env = [{"time": at, "env": name, "env/requests_in_flight": 1} for at in (5.0, 10.0) for name in "ab"]

    result = overlap(metrics, env)

    assert result is not None
    assert result.sampling_busy_s == 10.0


def test_overlap_does_not_invent_what_was_not_measured() -> None:
    assert overlap([], []) is None
    result = overlap([{"time": 20.0}], [])
    assert result is not None
    assert result.sampling_busy_s is None


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "synthetic")
    folder.ledger.mkdir()
    write = {
        "ledger/env-a.jsonl": delivered("a", "b"),
        "ledger/trainer.jsonl": [step(0, "a"), step(1, "b")],
        "metrics.jsonl": [
            {"step": 0, "time": 10.0, "tokens/step": 40, "time/sync_s": 1.0, "staleness/max": 0},
            {"step": 1, "time": 20.0, "tokens/step": 60, "time/sync_s": 2.0, "staleness/max": 1},
        ],
        "events.jsonl": [
            {"time": 0.0, "event": "session_started", "text": ""},
            {"time": 30.0, "event": "session_ended", "text": ""},
        ],
    }
    for name, lines in write.items():
        (folder.path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for phase, rewards in (("before", {"a": 0.2, "b": 0.4}), ("after", {"a": 0.6, "b": 0.8})):
        for name, reward in rewards.items():
            (folder.evaluation(phase) / name).mkdir(parents=True)
            results = {"results": {"all": {"heldout_reward": reward}}}
            (folder.evaluation(phase) / name / "metrics.json").write_text(json.dumps(results))
            (folder.evaluation(phase) / name / "samples.jsonl").write_text(
                "".join(json.dumps({"question": str(place), "score": reward}) + "\n" for place in range(10))
            )
    return folder


def test_the_summary_of_a_folder_counts_everything(run_folder: RunFolder) -> None:
    summary = summarise(run_folder, max_staleness_allowed=2)
    summary.write(run_folder.summary)

    saved = json.loads(run_folder.summary.read_text())
    assert saved["heldout_reward_before"] == pytest.approx(0.3)
    assert saved["heldout_reward_after"] == pytest.approx(0.7)
    assert saved["heldout_change"] == {"mean": 0.4, "low": 0.4, "high": 0.4, "items": 20}
    assert saved["heldout_by_environment"]["a"] == {"before": 0.2, "after": 0.6}
    assert (saved["steps"], saved["wall_s"]) == (2, 30.0)
    assert (saved["sequences_trained"], saved["sequences_lost"], saved["sequences_repeated"]) == (8, 0, 0)
    assert (saved["max_staleness_seen"], saved["weight_push_s_median"], saved["tokens_trained"]) == (1, 1.5, 100)


def test_the_summary_table_shows_before_and_after(run_folder: RunFolder) -> None:
    table = summary_table(summarise(run_folder))

    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert any("0.300 → 0.700" in cell and "(+0.400, 95 % +0.400 to +0.400)" in cell for cell in cells)


def test_an_empty_run_has_a_summary(tmp_path: Path) -> None:
    summary = summarise(RunFolder.create(tmp_path, "empty"), outcome="not finished")

    assert (summary.heldout_reward_before, summary.steps, summary.max_staleness_seen) == (None, 0, None)


def test_a_second_run_of_a_name_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path, "demo").run_id for _ in range(3)]

    assert names == ["demo", "demo-2", "demo-3"]
