"""Metrics and Weights & Biases, with a stand-in for the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from atroposlib.envs import wandb_logging
from atroposlib.envs.metrics import finish_reason_shares, length_metrics, timing_metrics
from tests.envs.fakes import CountingEnv, a_scored_group

MakeEnv = Callable[..., CountingEnv]


class FakeTable:
    def __init__(self, columns: list[str]) -> None:
        self.columns, self.data = columns, []  # type: ignore[var-annotated]

    def add_data(self, *row: Any) -> None:
        self.data.append(row)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package as far as we use it: `runs` are the arguments of init, `logged` those of log."""
    module: Any = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()
    module.run, module.runs, module.logged = None, [], []
    module.Error, module.Table = RuntimeError, FakeTable

    def init(**kwargs: Any) -> None:
        module.runs.append(kwargs)
        module.run = object()

    module.init = init
    module.log = lambda metrics, step: module.logged.append((step, metrics))
    module.finish = lambda: setattr(module, "run", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


async def open_wandb(env: CountingEnv) -> None:
    env.wandb_project, env.wandb_group, env.wandb_prepend = "project", "group", "counting"
    await env.setup_wandb()


async def test_a_run_is_opened_under_the_trainers_project(make_env: MakeEnv, wandb: Any) -> None:
    env = make_env(wandb_name="mine")

    await open_wandb(env)

    [run] = wandb.runs
    assert (run["project"], run["group"]) == ("project", "group")
    assert run["name"].startswith("mine-")
    assert len(run["name"].rsplit("-", 1)[1]) == 6
    assert run["config"]["group_size"] == 2


async def test_without_a_wandb_name_wandb_chooses_one(make_env: MakeEnv, wandb: Any) -> None:
    await open_wandb(make_env())

    assert wandb.runs[0]["name"] is None


@pytest.mark.parametrize("lacks", ["project", "package", "login"])
async def test_what_is_missing_switches_wandb_off_and_nothing_else(
    make_env: MakeEnv, wandb: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacks: str
) -> None:
    caplog.set_level("INFO")
    env = make_env()
    env.wandb_project = None if lacks == "project" else "project"
    if lacks == "package":
        monkeypatch.setattr(wandb_logging, "find_spec", lambda name: None)
    if lacks == "login":
        monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no key")))

    await env.setup_wandb()
    await env.wandb_log({"a": 1})

    assert env.config.use_wandb is False
    assert wandb.logged == []
    assert len(caplog.records) == 1


async def test_names_get_the_environments_prefix_and_all_servers_are_logged_without_it(
    make_env: MakeEnv, wandb: Any
) -> None:
    env = make_env()

    class Server:
        async def wandb_metrics(self, metrics: dict[str, Any], name: str) -> dict[str, Any]:
            return {**metrics, f"server/{name}_request_time_avg": 1.0}

    env.server.servers = [Server(), Server()]  # type: ignore[list-item]
    await open_wandb(env)
    env.curr_step = 7

    await env.wandb_log({"train/own": 3})

    [(step, metrics)] = wandb.logged
    assert step == 7
    assert metrics["counting_train/own"] == 3
    assert {"server/server_0_request_time_avg", "server/server_1_request_time_avg"} <= metrics.keys()


async def test_sample_rollouts_become_a_table(make_env: MakeEnv, wandb: Any) -> None:
    env = make_env(num_rollouts_to_keep=2, num_rollouts_per_group_for_logging=5)
    await open_wandb(env)
    for score in (0.25, 0.5, 0.75):
        # Fewer sequences than asked for: all of them.
        await env.add_rollouts_for_wandb(a_scored_group((score, 1.0)))

    await env.wandb_log({})

    table = wandb.logged[0][1]["counting_train/rollouts"]
    assert table.columns == ["text", "score"]
    assert [score for _, score in table.data] == [0.5, 1.0, 0.75, 1.0]


@pytest.mark.parametrize(("asked", "kept"), [(-1, 2), (1, 1), (0, 0)])
async def test_how_many_sequences_of_a_group_are_kept(make_env: MakeEnv, asked: int, kept: int) -> None:
    env = make_env(num_rollouts_per_group_for_logging=asked)

    await env.add_rollouts_for_wandb([a_scored_group()])

    assert [len(rows) for rows in env.rollouts_for_wandb] == [kept]


async def test_an_author_may_replace_the_list_and_add_columns_of_its_own(make_env: MakeEnv, wandb: Any) -> None:
    env = make_env()
    await open_wandb(env)
    env.rollouts_for_wandb = [[("text", 1.0, "more")]]

    await env.wandb_log({})

    assert wandb.logged[0][1]["counting_train/rollouts"].data == [("text", 1.0)]


async def test_metrics_go_to_the_records_and_buffers_are_cleared_without_wandb(make_env: MakeEnv) -> None:
    env = make_env(use_wandb=False)
    seen: list[dict[str, Any]] = []
    env.metrics_sink = seen.append
    env.max_token_len = 100
    env.completion_lengths = [10, 20, 96]
    env.task_duration.extend([1.0, 3.0])
    env.task_successful.extend([1, 0, 1])

    await env.wandb_log({"train/own": 1})
    await env.wandb_log()

    [metrics] = seen
    assert metrics["train/own"] == 1
    assert metrics["train/completion_lengths"] == 42.0
    assert metrics["train_perf/task_duration_mean"] == 2.0
    assert (metrics["train/items_sent_to_api"], metrics["train/items_rejected"]) == (2, 1)


def test_lengths_have_upstreams_names_and_a_real_percentile() -> None:
    metrics = length_metrics([10] * 90 + [96] * 10, max_token_len=100)

    assert metrics["train/completion_lengths_p95"] == pytest.approx(0.1)
    assert metrics["train/completion_lengths_percentile_95_tokens"] == pytest.approx(96.0)
    assert (metrics["train/completion_lengths_max"], metrics["train/completion_lengths_min"]) == (96.0, 10.0)
    assert length_metrics([], max_token_len=100) == {}


def test_durations_need_two_samples() -> None:
    metrics = timing_metrics({"task_duration": [1.0, 3.0], "mainloop_timings": [1.0]})

    assert metrics == {
        "train_perf/task_duration_mean": 2.0, "train_perf/task_duration_std": 1.0,
        "train_perf/task_duration_max": 3.0, "train_perf/task_duration_min": 1.0,
    }  # fmt: skip


def test_shares_of_stop_reasons() -> None:
    assert finish_reason_shares({"stop": 3, "length": 1}) == {
        "train/finish_reason_stop_share": 0.75,
        "train/finish_reason_length_share": 0.25,
    }
    assert finish_reason_shares({}) == {}
