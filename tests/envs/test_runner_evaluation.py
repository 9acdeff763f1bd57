"""What training does while an evaluation runs, and that no evaluation is lost or doubled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from atroposlib.envs.serving import runner
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.runner import EnvRunner
from tests.envs.fakes import CountingEnv, FakeRolloutServer, a_scored_group

MakeEnv = Callable[..., CountingEnv]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "_rolling", 0)
    monkeypatch.setattr(runner, "NO_ITEM_PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "STATUS_PERIOD_S", 0.01)


async def run(env: CountingEnv, server: FakeRolloutServer) -> list[dict[str, Any]]:
    """The evaluations on record."""
    records = RunRecords(env.config.run_dir, env.display_name)
    try:
        async with asyncio.timeout(15):
            await EnvRunner(env, server, records).run()
    finally:
        records.close()
    path = env.config.run_dir / "evals.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Watch:
    """An evaluation of a few looks at what goes on beside it."""

    def __init__(self, env: CountingEnv) -> None:
        self.env = env
        self.started_beside: list[int] = []
        self.in_flight_beside = 0
        env.evaluate = self.evaluate  # type: ignore[method-assign]

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        before = len(self.env.collected)
        for look in range(10):
            await asyncio.sleep(0.005)
            # Those that were in flight when it began have ended after the first looks.
            if look > 3:
                self.in_flight_beside = max(self.in_flight_beside, _rolling)
        self.started_beside.append(len(self.env.collected) - before)
        return {"accuracy": 0.5}


_rolling = 0
"""Items in `brief`."""


async def brief(item: int) -> Any:
    global _rolling
    _rolling += 1
    await asyncio.sleep(0.002)
    _rolling -= 1
    return a_scored_group()


async def test_stop_train_starts_no_group_and_lets_those_in_flight_finish(make_env: MakeEnv) -> None:
    env = make_env(brief, steps_per_eval=2, eval_handling="STOP_TRAIN", max_num_workers=4)
    server = FakeRolloutServer(batch=4, steps=6, in_flight=8)
    watch = Watch(env)

    evaluations = await run(env, server)

    assert watch.started_beside == [0] * len(watch.started_beside)
    assert len(evaluations) == len(watch.started_beside) >= 2
    assert len(server.groups) >= 24
    assert server.tickets == set()


async def test_limit_train_keeps_a_share_of_the_workers(make_env: MakeEnv) -> None:
    env = make_env(brief, steps_per_eval=2, eval_handling="LIMIT_TRAIN", eval_limit_ratio=0.5, max_num_workers=5)
    server = FakeRolloutServer(batch=4, steps=30, in_flight=20)
    watch = Watch(env)

    await run(env, server)

    assert 1 <= watch.in_flight_beside <= 2


async def test_none_changes_nothing(make_env: MakeEnv) -> None:
    env = make_env(brief, steps_per_eval=2, eval_handling="NONE", max_num_workers=5)
    server = FakeRolloutServer(batch=4, steps=30, in_flight=20)
    watch = Watch(env)

    await run(env, server)

    assert watch.in_flight_beside > 2
    assert max(watch.started_beside) > 5


async def test_a_step_is_noticed_while_all_workers_are_busy(make_env: MakeEnv) -> None:
    """Other environments may take the steps while this one's rollouts are long."""
    evaluated = asyncio.Event()

    async def until_evaluated(item: int) -> Any:
        if item == 0:
            server.groups.update(dict.fromkeys(("other-1", "other-2"), None))  # type: ignore[arg-type]
            await evaluated.wait()
        return a_scored_group()

    env = make_env(until_evaluated, steps_per_eval=1, max_num_workers=1)
    server = FakeRolloutServer(batch=2, steps=3, in_flight=1)

    async def evaluate(*args: Any, **kwargs: Any) -> None:
        evaluated.set()

    env.evaluate = evaluate  # type: ignore[method-assign,assignment]

    await run(env, server)

    assert evaluated.is_set()


async def test_an_evaluation_that_still_runs_is_not_doubled(
    make_env: MakeEnv, caplog: pytest.LogCaptureFixture
) -> None:
    env = make_env(brief, steps_per_eval=1, eval_handling="NONE")
    server = FakeRolloutServer(batch=2, steps=6)
    running = peak = 0

    async def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.03)
        running -= 1
        return {"accuracy": 1.0}

    env.evaluate = evaluate  # type: ignore[method-assign]

    await run(env, server)

    assert peak == 1
    assert "the last evaluation still runs" in caplog.text


@pytest.mark.parametrize("problem", ["error", "hang"])
async def test_an_evaluation_that_fails_or_hangs_lets_training_go_on_and_says_why(
    make_env: MakeEnv, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    env = make_env(brief, steps_per_eval=2, eval_deadline_s=0.02)
    server = FakeRolloutServer(batch=2, steps=5)

    async def evaluate(*args: Any, **kwargs: Any) -> None:
        if problem == "error":
            raise KeyError("heldout")
        await asyncio.sleep(60)

    env.evaluate = evaluate  # type: ignore[method-assign,assignment]

    evaluations = await run(env, server)

    assert evaluations == []
    assert len(server.groups) >= 10
    assert ("heldout" if problem == "error" else "TimeoutError") in caplog.text


async def test_the_off_policy_bound_holds_where_it_was_asked_for(make_env: MakeEnv) -> None:
    in_flight = peak = 0

    async def counted(item: int) -> Any:
        nonlocal in_flight, peak
        in_flight += 1
        peak = max(peak, in_flight)
        await asyncio.sleep(0.002)
        in_flight -= 1
        return a_scored_group()

    # batch_size is 8 sequences, so one batch is four groups of two.
    server = FakeRolloutServer(batch=1, steps=12, in_flight=20)
    await run(make_env(counted, max_num_workers=10, max_batches_offpolicy=1), server)
    assert peak == 4

    peak = 0
    await run(make_env(counted, max_num_workers=10), FakeRolloutServer(batch=1, steps=12, in_flight=20))
    assert peak == 10
