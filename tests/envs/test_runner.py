"""What the collection loop promises, played against a rollout server in memory."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs.serving import group_work, membership, runner
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.runner import EnvRunner
from atroposlib.errors import AtroposError, GroupFormatError, RolloutError, ServerUnreachableError
from atroposlib.wire.columns import Group
from atroposlib.wire.models import GroupResult
from tests.envs.fakes import CountingEnv, FakeRolloutServer, a_scored_group

MakeEnv = Callable[..., CountingEnv]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "NO_ITEM_PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "METRICS_PERIOD_S", 0.02)


async def run(env: CountingEnv, server: FakeRolloutServer) -> EnvRunner:
    records = RunRecords(env.config.run_dir, env.display_name)
    made = EnvRunner(env, server, records)
    try:
        async with asyncio.timeout(20):
            await made.run()
    finally:
        records.close()
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_every_accepted_group_is_in_the_ledger_once_and_the_end_of_the_run_ends_the_loop(
    make_env: MakeEnv,
) -> None:
    env, server = make_env(), FakeRolloutServer(batch=2, steps=3)

    await run(env, server)

    ledger = lines(env.config.run_dir / "ledger" / "env-counting.jsonl")
    assert sorted(entry["group_id"] for entry in ledger) == sorted(server.groups)
    assert {entry["sequences"] for entry in ledger} == {2}
    assert server.tickets == set()


async def test_a_group_carries_its_ticket_and_the_versions_that_the_engine_reported(make_env: MakeEnv) -> None:
    env = make_env(lambda item: {**a_scored_group(length=6), "policy_versions": [[(-1, 2), (3, 1), (4, 3)]] * 2})
    server = FakeRolloutServer()
    tickets: list[str | None] = []
    server.on_post = lambda group: tickets.append(group.ticket)

    await run(env, server)

    group = next(iter(server.groups.values()))
    assert group.versions_per_token().tolist() == [-1, -1, 3, 4, 4, 4] * 2
    assert group.loss_mask.tolist() == [0, 0, 1, 1, 1, 1] * 2
    assert group.inference_logprobs is not None
    assert group.inference_logprobs.tolist() == [0.0, 0.0, -0.5, -0.5, -0.5, -0.5] * 2
    assert None not in tickets
    assert len(set(tickets)) == len(tickets)


async def test_no_more_groups_are_in_flight_than_workers_and_none_without_a_ticket(make_env: MakeEnv) -> None:
    in_flight = peak = 0

    async def slow(item: int) -> Any:
        nonlocal in_flight, peak
        in_flight += 1
        peak = max(peak, in_flight)
        await asyncio.sleep(0.01)
        in_flight -= 1
        return a_scored_group()

    server = FakeRolloutServer(batch=4, steps=4, in_flight=100)
    await run(make_env(slow, max_num_workers=3), server)
    assert peak == 3

    peak = 0
    await run(make_env(slow, max_num_workers=50), FakeRolloutServer(batch=4, steps=4, in_flight=2))
    assert peak == 2


async def test_a_group_without_variance_gives_its_ticket_back_with_the_reason(make_env: MakeEnv) -> None:
    env = make_env(lambda item: a_scored_group((1.0, 1.0) if item % 2 else (0.0, 1.0)))
    server = FakeRolloutServer(batch=2, steps=2)

    made = await run(env, server)

    assert server.returned["zero_variance"] == made.stats.groups_dropped["zero_variance"] > 0
    assert all(set(group.scores.tolist()) == {0.0, 1.0} for group in server.groups.values())


async def test_equal_scores_are_sent_when_asked_for(make_env: MakeEnv) -> None:
    server = FakeRolloutServer()

    await run(make_env(lambda item: a_scored_group((1.0, 1.0)), ensure_scores_are_not_same=False), server)

    assert server.returned["zero_variance"] == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (a_scored_group(length=50), "too_long"),
        (a_scored_group((0.0, 1.0, 2.0)), "wrong_size"),
        (None, "empty"),
        ({"scores": [1.0]}, "env_error"),
        ({**a_scored_group(), "inference_logprobs": [[-0.5], [-0.5]]}, "refused"),
    ],
)  # fmt: skip
async def test_what_cannot_be_sent_is_dropped_with_its_reason(make_env: MakeEnv, bad: Any, reason: str) -> None:
    env = make_env(lambda item: bad if item == 0 else a_scored_group())
    server = FakeRolloutServer(max_token_len=40)

    made = await run(env, server)

    assert made.stats.groups_dropped[reason] == 1
    assert server.returned[reason] == 1


async def test_an_infrastructure_failure_is_tried_again_and_never_scored(make_env: MakeEnv) -> None:
    failures = iter([RolloutError("server died"), RolloutError("server died")])

    def flaky(item: int) -> Any:
        if item == 0 and (error := next(failures, None)) is not None:
            raise error
        return a_scored_group()

    env, server = make_env(flaky, max_num_workers=1), FakeRolloutServer(batch=2, steps=3)

    made = await run(env, server)

    assert env.collected[:1] == [0]
    assert env.collected.count(0) == 3
    assert server.returned["rollout_error"] == made.stats.rollouts_retried == 2


async def test_infrastructure_failures_in_a_task_group_of_the_author_are_no_bug_of_theirs(make_env: MakeEnv) -> None:
    failures = iter([ExceptionGroup("of a TaskGroup", [RolloutError("server died"), RolloutError("server died")])])

    def flaky(item: int) -> Any:
        if (error := next(failures, None)) is not None:
            raise error
        return a_scored_group()

    env, server = make_env(flaky, max_num_workers=1), FakeRolloutServer(batch=2, steps=3)

    made = await run(env, server)

    assert made.stats.groups_dropped == {"rollout_error": 1}
    assert env.collected.count(0) == 2


async def test_a_bug_beside_an_infrastructure_failure_is_still_a_bug(make_env: MakeEnv) -> None:
    def buggy(item: int) -> Any:
        if item == 0:
            raise ExceptionGroup("of a TaskGroup", [RolloutError("server died"), KeyError("answer")])
        return a_scored_group()

    made = await run(make_env(buggy), FakeRolloutServer())

    assert made.stats.groups_dropped == {"env_error": 1}


async def test_a_group_over_its_deadline_is_given_up(make_env: MakeEnv) -> None:
    async def hang_once(item: int) -> Any:
        if item == 0:
            await asyncio.sleep(60)
        return a_scored_group()

    server = FakeRolloutServer()

    made = await run(make_env(hang_once, group_deadline_s=0.03, max_num_workers=1), server)

    assert made.stats.groups_dropped == {"deadline": group_work.ITEM_TRIES}
    assert server.returned["deadline"] == group_work.ITEM_TRIES


async def test_a_bug_in_the_environment_costs_its_group_and_a_row_of_them_ends_the_run(make_env: MakeEnv) -> None:
    def buggy(item: int) -> Any:
        if item < 3:
            raise KeyError("answer")
        return a_scored_group()

    server = FakeRolloutServer()
    await run(make_env(buggy), server)
    assert server.returned["env_error"] == 3

    def broken(item: int) -> Any:
        raise KeyError("answer")

    with pytest.raises(ExceptionGroup) as raised:
        await run(make_env(broken), FakeRolloutServer())
    assert raised.group_contains(AtroposError, match="failed on 32 items in a row.*answer")


async def test_a_lost_answer_makes_a_duplicate_not_a_second_group(make_env: MakeEnv) -> None:
    env, server = make_env(), FakeRolloutServer(batch=2, steps=2)
    server.lose_answers = 2

    await run(env, server)

    ledger = [entry["group_id"] for entry in lines(env.config.run_dir / "ledger" / "env-counting.jsonl")]
    assert len(ledger) == len(set(ledger)) == len(server.groups)


async def test_a_retired_group_is_counted_and_not_in_the_ledger(make_env: MakeEnv) -> None:
    env, server = make_env(), FakeRolloutServer()
    first: list[str] = []

    def status(group: Any) -> str:
        if not first:
            first.append(group.group_id)
        return "retired" if group.group_id == first[0] else "accepted"

    server.status_of = status

    made = await run(env, server)

    assert made.stats.groups_dropped["retired_stale"] == 1
    assert first[0] not in {entry["group_id"] for entry in lines(env.config.run_dir / "ledger" / "env-counting.jsonl")}


async def test_an_item_whose_group_came_too_late_to_be_kept_is_rolled_out_anew_where_the_run_asks_for_it(
    make_env: MakeEnv,
) -> None:
    env, server = make_env(), FakeRolloutServer(batch=2, steps=3)
    server.retired_because = "requeue"
    first: list[str] = []

    def status(group: Any) -> str:
        first.append(group.group_id)
        return "retired" if group.group_id == first[0] else "accepted"

    server.status_of = status

    await run(env, server)

    assert env.collected.count(0) == 2
    assert max(env.collected.count(item) for item in env.collected if item != 0) == 1


async def test_a_group_names_the_run_it_was_made_for(make_env: MakeEnv) -> None:
    server = FakeRolloutServer()

    await run(make_env(), server)

    assert {group.run_id for group in server.groups.values()} == {f"id-of-{server.request.run_name}"}


async def test_it_waits_for_a_trainer(make_env: MakeEnv) -> None:
    server = FakeRolloutServer()
    server.has_run = False

    async def trainer_comes() -> None:
        await asyncio.sleep(0.05)
        server.has_run = True

    await asyncio.gather(run(make_env(), server), trainer_comes())

    assert len(server.registrations) == 1


async def test_it_gives_up_when_no_trainer_comes_in_time(make_env: MakeEnv) -> None:
    server = FakeRolloutServer()
    server.has_run = False

    with pytest.raises(ExceptionGroup) as raised:
        await run(make_env(server_deadline_s=0.05), server)

    assert raised.group_contains(ServerUnreachableError, match="no trainer")


async def test_a_server_that_forgot_the_environment_gets_it_again_and_the_group_in_hand_arrives(
    make_env: MakeEnv,
) -> None:
    server = FakeRolloutServer(batch=2, steps=3)
    posted: list[str] = []

    def forget(group: Any) -> None:
        posted.append(group.group_id)
        if len(posted) == 2:
            server.restart_without_memory()

    server.on_post = forget

    made = await run(make_env(max_num_workers=4), server)

    assert len(server.registrations) == 2
    assert {request.name for request in server.registrations} == {"counting"}
    assert made.stats.groups_dropped.total() == 0


async def test_groups_of_an_earlier_run_are_not_sent_into_a_new_one(make_env: MakeEnv) -> None:
    server = FakeRolloutServer(batch=2, steps=3)
    names: list[str] = []

    def change(group: Any) -> None:
        if not names:
            server.request = server.request.model_copy(update={"run_name": "another"})
            server.restart_without_memory()
        names.append(group.group_id)

    server.on_post = change

    async def slow(item: int) -> Any:
        await asyncio.sleep(0.02 if item else 0.0)
        return a_scored_group()

    made = await run(make_env(slow, max_num_workers=4), server)

    assert made.stats.groups_dropped["run_changed"] >= 1


async def test_tickets_are_renewed_while_their_rollouts_live(make_env: MakeEnv) -> None:
    server = FakeRolloutServer(batch=1, steps=1, in_flight=1)
    server.deadline_s = 0.06

    async def slow(item: int) -> Any:
        # The first renewal comes with the default period until a ticket told the real one.
        await asyncio.sleep(0.2)
        return a_scored_group()

    env = make_env(slow)
    made = EnvRunner(env, server, RunRecords(None, "counting"))
    made._tickets._period_s = 0.02
    async with asyncio.timeout(20):
        await made.run()

    assert server.renewed["t0"] >= 2


async def test_stop_gives_all_tickets_back(make_env: MakeEnv) -> None:
    server = FakeRolloutServer(in_flight=4)

    all_started = asyncio.Event()

    async def endless(item: int) -> Any:
        if item == 3:
            all_started.set()
        await asyncio.sleep(60)

    made = EnvRunner(make_env(endless, max_num_workers=4), server, RunRecords(None, "counting"))

    async def stop_when_busy() -> None:
        await all_started.wait()
        made.stop()

    async with asyncio.timeout(20):
        await asyncio.gather(made.run(), stop_when_busy())

    assert server.tickets == set()
    assert server.returned["shutdown"] == 4


async def test_several_groups_of_one_item_have_a_ticket_each(make_env: MakeEnv) -> None:
    server = FakeRolloutServer(batch=3, steps=2, in_flight=1)
    tickets: list[str | None] = []
    server.on_post = lambda group: tickets.append(group.ticket)

    await run(make_env(lambda item: [a_scored_group(), None, a_scored_group((1.0, 1.0)), a_scored_group()]), server)

    assert len(set(tickets)) == len(tickets) == len(server.groups)


async def test_evaluation_runs_at_every_crossing_also_when_steps_jump(make_env: MakeEnv) -> None:
    env = make_env(steps_per_eval=2)
    server = FakeRolloutServer(batch=1, steps=9, in_flight=3)

    async def slow(item: int) -> Any:
        await asyncio.sleep(0.005)
        return a_scored_group()

    type(env).make = staticmethod(slow)

    await run(env, server)

    crossings = [entry["step"] // 2 for entry in lines(env.config.run_dir / "evals.jsonl")]
    assert crossings == sorted(set(crossings))
    assert len(crossings) >= 3
    assert lines(env.config.run_dir / "evals.jsonl")[0]["metrics"] == {"heldout_reward": 0.5}


async def test_metrics_and_sample_rollouts_are_written(make_env: MakeEnv) -> None:
    env = make_env()

    await run(env, FakeRolloutServer())

    last = lines(env.config.run_dir / "env_metrics.jsonl")[-1]
    assert last["env"] == "counting"
    assert last["env/groups_sent"] == len(lines(env.config.run_dir / "rollouts.jsonl"))
    assert {"tokens_per_s", "busy_s", "env/reward_mean", "env/groups_dropped", "env/groups_in_flight"} <= last.keys()


async def test_nothing_is_written_without_a_run_dir(make_env: MakeEnv, tmp_path: Path) -> None:
    await run(make_env(run_dir=None), FakeRolloutServer())

    assert os.listdir(tmp_path) == []


async def test_records_that_cannot_be_written_cost_a_line_in_the_log_and_not_the_run(
    make_env: MakeEnv, caplog: pytest.LogCaptureFixture
) -> None:
    env, server = make_env(steps_per_eval=1), FakeRolloutServer(batch=2, steps=3)
    names = ("env_metrics.jsonl", "rollouts.jsonl", "evals.jsonl")
    for name in names:
        (env.config.run_dir / name).mkdir(parents=True)

    await run(env, server)

    ledger = lines(env.config.run_dir / "ledger" / "env-counting.jsonl")
    assert sorted(entry["group_id"] for entry in ledger) == sorted(server.groups)
    assert [caplog.text.count(f"{name} of run_dir") for name in names] == [1, 1, 1]


async def test_a_ledger_that_cannot_be_written_ends_the_run(make_env: MakeEnv) -> None:
    env = make_env()
    (env.config.run_dir / "ledger" / "env-counting.jsonl").mkdir(parents=True)

    with pytest.raises(ExceptionGroup) as raised:
        await run(env, FakeRolloutServer())

    assert raised.group_contains(AtroposError, match=r"cannot be entered into ledger.*run_dir")


async def test_a_group_that_is_no_json_costs_only_itself(make_env: MakeEnv) -> None:
    def make(item: int) -> Any:
        return {**a_scored_group(), "messages": [object() if item == 1 else "fine"]}

    server = FakeRolloutServer(batch=2, steps=3)
    made = await run(make_env(make), server)

    assert made.stats.groups_dropped == {"refused": 1}
    assert len(server.groups) >= 6


async def test_a_group_that_comes_after_its_item_is_over_does_not_take_the_returned_ticket(make_env: MakeEnv) -> None:
    late: list[asyncio.Task[None]] = []

    async def send_late(env: CountingEnv) -> None:
        await gone_back.wait()
        assert env.run_link is not None
        await env.run_link.send([a_scored_group()])

    async def make(item: int) -> Any:
        if item > 0:
            return a_scored_group()
        late.append(asyncio.create_task(send_late(env)))
        return None

    gone_back = asyncio.Event()
    env, server = make_env(make, max_num_workers=1), FakeRolloutServer(batch=2, steps=3)
    without_ticket: list[str] = []

    def check(group: Group) -> None:
        if group.ticket not in server.tickets:
            without_ticket.append(group.group_id)

    def note_step(group: Group) -> None:
        check(group)
        gone_back.set()

    server.on_post = note_step
    await run(env, server)
    await asyncio.gather(*late)

    assert server.returned["empty"] == 1
    assert without_ticket == []


async def test_a_refused_group_does_not_stop_those_that_travel_with_it(make_env: MakeEnv) -> None:
    class Picky(FakeRolloutServer):
        """Refuses a whole request because of one group in it, as the real one does."""

        largest = 0

        async def post_groups(self, groups: Sequence[Group]) -> list[GroupResult]:
            self.largest = max(self.largest, len(groups))
            if any(group.scores.tolist() == [0.0, 0.5] for group in groups):
                raise GroupFormatError("no")
            await asyncio.sleep(0.005)
            return await super().post_groups(groups)

    server = Picky(batch=8, steps=2, in_flight=8)
    env = make_env(lambda item: a_scored_group((0.0, 0.5) if item == 3 else (0.0, 1.0)), max_num_workers=8)

    made = await run(env, server)

    assert made.stats.groups_dropped == {"refused": 1}
    assert server.largest > 1
    assert env.collected.count(3) == 1
    assert len(server.groups) >= 16


async def test_tickets_granted_to_a_poll_that_was_given_up_go_back_too(make_env: MakeEnv) -> None:
    """All places are taken, a poll waits; leaving frees places, and the server gives them to that poll."""
    server = FakeRolloutServer(in_flight=2)
    both_started = asyncio.Event()

    async def endless(item: int) -> Any:
        if item == 1:
            both_started.set()
        await asyncio.sleep(60)

    made = EnvRunner(make_env(endless, max_num_workers=8), server, RunRecords(None, "counting"))

    async def stop_while_polling() -> None:
        await both_started.wait()
        await asyncio.sleep(0.05)
        made.stop()

    async with asyncio.timeout(20):
        await asyncio.gather(made.run(), stop_while_polling())

    assert server.tickets == set()
    assert server.returned["shutdown"] == 4
