"""Regression tests of the rollout server's pitfalls, over real HTTP; the table is in test_pitfalls.py."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest

from atroposlib.api.utils import grab_batch_with_minimum_allocations
from atroposlib.envs.serving.delivery import wire_group
from atroposlib.wire.columns import encode_group
from rollout_server.batching import EnvShare, QueuedGroup, plan_batch
from rollout_server.config import ServerConfig
from tests.compat.old_bodies import ENV, REGISTRATION, numbers, old_group
from tests.compat.sdk.old_env import a_group
from tests.processes import rollout_server_on_a_thread


class Servers:
    """Starts rollout servers with options; gives a client of each."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def start(self, **options: Any) -> httpx.Client:
        settings = {"store": "memory", "port": 0, **options}
        url = self._open.enter_context(rollout_server_on_a_thread(ServerConfig.model_validate(settings)))
        return self._open.enter_context(httpx.Client(base_url=url, headers={"Accept-Encoding": ""}, timeout=10.0))

    def stop(self) -> None:
        self._open.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.stop()


@pytest.fixture
def http(servers: Servers) -> httpx.Client:
    return servers.start()


@pytest.fixture
def joined(http: httpx.Client) -> httpx.Client:
    join(http)
    return http


def join(http: httpx.Client, **env: Any) -> int:
    """A trainer and an environment."""
    http.post("/register", json=REGISTRATION).raise_for_status()
    return int(http.post("/register-env", json=ENV | env).json()["env_id"])


def post(http: httpx.Client, *groups: dict[str, Any]) -> None:
    http.post("/scored_data_list", json=list(groups)).raise_for_status()


def take(http: httpx.Client) -> list[float]:
    return numbers(http.get("/batch").raise_for_status().json()["batch"])


def test_pitfall_07_data_before_any_trainer_leaves_registration_open(http: httpx.Client) -> None:
    post(http, old_group(1.0, env_id=None), old_group(2.0, env_id=None))
    assert http.post("/register-env", json=ENV).json()["status"] == "wait for trainer to start"

    http.post("/register", json=REGISTRATION).raise_for_status()

    assert http.post("/register-env", json=ENV).json()["status"] == "success"
    assert take(http) == [1.0, 2.0], "and the data is not lost"


def test_pitfall_08_a_second_registration_applies_and_keeps_the_queue(joined: httpx.Client) -> None:
    post(joined, old_group(1.0), old_group(2.0), old_group(3.0))

    answer = joined.post("/register", json=REGISTRATION | {"batch_size": 6, "max_token_len": 99}).json()

    assert isinstance(answer["uuid"], int)
    assert joined.get("/info").json() == {"batch_size": 6, "max_token_len": 99}
    assert take(joined) == [1.0, 2.0, 3.0]


def test_pitfall_09_a_restart_loses_nothing(tmp_path: Path) -> None:
    servers, kept = Servers(), {"store": "sqlite", "data_dir": tmp_path / "data", "synchronous": "normal"}
    http = servers.start(**kept)
    join(http)
    post(http, old_group(1.0))
    servers.stop()

    http = servers.start(**kept)
    post(http, old_group(2.0))

    assert http.get("/info").json() == {"batch_size": 4, "max_token_len": 64}
    assert take(http) == [1.0, 2.0]
    assert http.post("/register-env", json=ENV).json()["env_id"] == 1
    servers.stop()


def test_pitfall_10_a_batch_whose_receiver_is_gone_is_offered_again(joined: httpx.Client) -> None:
    post(joined, *(old_group(float(i)) for i in range(4)))
    assert take(joined) == [0.0, 1.0], "and its receiver dies"

    joined.post("/register", json=REGISTRATION).raise_for_status()

    assert take(joined) == [0.0, 1.0]
    assert take(joined) == [2.0, 3.0]
    assert joined.get("/status").json()["current_step"] == 2


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_pitfall_11_a_number_that_is_none_is_refused_on_entry(number: str, joined: httpx.Client) -> None:
    post(joined, old_group(1.0))
    bad = json.dumps(old_group(2.0)).replace("2.0", number)

    answer = joined.post("/scored_data", content=bad, headers={"Content-Type": "application/json"})

    assert answer.status_code == 422
    post(joined, old_group(3.0))
    assert take(joined) == [1.0, 3.0]


def test_pitfall_12_one_odd_sized_group_blocks_nothing(joined: httpx.Client) -> None:
    post(joined, old_group(1.0, n=3), old_group(2.0), old_group(3.0))

    assert take(joined) == [2.0, 3.0]
    post(joined, old_group(4.0, n=1))
    assert sorted(take(joined)) == [1.0, 4.0]


def test_pitfall_13_groups_of_nobody_and_silent_minimums_starve_nobody(servers: Servers) -> None:
    http = servers.start(allocation_wait_s=0)
    silent = join(http, min_batch_allocation=0.5)

    post(http, old_group(1.0, env_id=None), old_group(2.0, env_id=None))
    # The first call notices what is lacking; the wait for it, here of no time, is over at the second.
    assert take(http) + take(http) == [1.0, 2.0]

    post(http, old_group(3.0, env_id=silent), old_group(4.0, env_id=None))
    assert take(http) == [3.0, 4.0], "groups of nobody fill what minimums leave"


def test_pitfall_14_groups_of_another_size_are_queued_in_sight(servers: Servers) -> None:
    http = servers.start(max_queued_bytes=1 << 11)
    join(http)

    post(http, old_group(1.0, n=3))

    assert http.get("/status").json()["queue_size"] == 1
    assert http.get("/v1/status").json()["queued_sequences"] == 3
    answers = {http.post("/scored_data", json=old_group(float(i), n=3)).status_code for i in range(2, 99)}
    assert answers == {200, 503}, "and the queue is bounded"


def test_pitfall_15_the_oldest_comes_first_and_each_delivery_is_one_step(joined: httpx.Client) -> None:
    post(joined, *(old_group(float(i)) for i in range(6)))

    seen = [(take(joined), joined.get("/status").json()["current_step"]) for _ in range(3)]

    assert seen == [([0.0, 1.0], 1), ([2.0, 3.0], 2), ([4.0, 5.0], 3)]


@pytest.mark.parametrize("weight", [0, -1])
def test_pitfall_16_no_weight_or_nobody_connected_divides_by_nothing(weight: float, http: httpx.Client) -> None:
    env_id = join(http, weight=weight)

    before = http.get("/status-env", params={"env_id": env_id})
    http.post("/disconnect-env", json={"env_id": env_id})
    after = http.get("/status-env", params={"env_id": env_id})

    assert (before.status_code, before.json()["env_weight"]) == (200, 0.01)
    assert (after.status_code, after.json()["env_weight"] > 0) == (200, True)


def test_pitfall_17_the_status_is_asked_by_body_query_or_post(joined: httpx.Client) -> None:
    answers = [
        joined.request("GET", "/status-env", json={"env_id": 0}),
        joined.get("/status-env", params={"env_id": 0}),
        joined.post("/status-env", json={"env_id": 0}),
    ]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json() == answers[1].json() == answers[2].json()


def test_pitfall_18_strangers_change_nothing_and_looking_changes_nothing(servers: Servers) -> None:
    tokens = {"env": ["env-token-000000000"], "trainer": ["trainer-token-00000"]}
    http = servers.start(tokens=tokens)
    env, trainer = ({"Authorization": f"Bearer {tokens[role][0]}"} for role in ("env", "trainer"))
    http.post("/register", json=REGISTRATION, headers=trainer).raise_for_status()
    http.post("/scored_data", json=old_group(1.0, env_id=None), headers=env).raise_for_status()

    refused = [http.get("/reset_data").status_code, http.get("/reset_data", headers=env).status_code]
    looks = [http.get(path, headers=env) for path in ("/latest_example", "/status", "/latest_example")]
    foreign = http.get("/status", headers=trainer | {"Origin": "https://elsewhere.example"})

    assert refused == [401, 403]
    assert [look.status_code for look in looks] == [200] * 3
    assert looks[1].json()["queue_size"] == 1
    assert "access-control-allow-origin" not in foreign.headers
    assert http.post("/reset_data", headers=trainer).text == "Reset successful"


class CallCounter:
    """Counts the Python calls of threads that start while it is installed, when switched on."""

    def __init__(self) -> None:
        self.is_on, self.calls = False, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        self.calls += self.is_on and event == "call"

    def during(self, ask: Any) -> int:
        self.is_on, self.calls = True, 0
        ask()
        self.is_on = False
        return self.calls


@pytest.fixture
def counter() -> Iterator[CallCounter]:
    counter, before = CallCounter(), sys.getprofile()
    threading.setprofile(counter)
    yield counter
    threading.setprofile(before)


def test_pitfall_19_a_poll_costs_the_same_whatever_is_queued(counter: CallCounter, servers: Servers) -> None:
    http = servers.start()
    env_id = join(http)
    post(http, old_group(0.0, n=1))

    def poll() -> None:
        http.get("/status-env", params={"env_id": env_id})
        assert http.get("/batch").json() == {"batch": None}

    poll()
    short = counter.during(poll)
    # Groups that cannot make a batch of 4: /batch goes on answering null.
    http.post("/register", json=REGISTRATION | {"batch_size": 4000}).raise_for_status()
    post(http, *(old_group(float(i)) for i in range(1, 600)))
    poll()
    long = counter.during(poll)

    assert http.get("/status").json()["queue_size"] == 600
    assert short > 0
    assert long < short + 300, f"{short} calls with one group queued, {long} with 600"


class Compared(dict[str, Any]):
    """A group that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Compared.comparisons += 1
        return self is other

    __hash__ = None


def test_pitfall_20_a_batch_with_minimums_compares_no_group_with_another() -> None:
    groups: Any = [Compared(tokens=[[1]] * 2, env_id=i % 2) for i in range(200)]
    configs = [{"env_id": i, "min_batch_allocation": 0.25, "connected": True, "group_size": 2} for i in range(2)]

    batch, rest = grab_batch_with_minimum_allocations(groups, 200, configs)

    assert (len(batch or ()), len(rest)) == (100, 100)
    assert Compared.comparisons == 0


def test_pitfall_20_the_work_for_a_batch_does_not_grow_with_the_square_of_the_queue() -> None:
    shares = {i: EnvShare(minimum=0.25) for i in range(2)}

    def calls(queued: int) -> int:
        queue = [QueuedGroup(key, key % 2, 2 + key % 3, 10, 0, 0) for key in range(queued)]
        counter, before = CallCounter(), sys.getprofile()
        sys.setprofile(counter)
        made = counter.during(lambda: plan_batch(queue, 100, shares=shares))
        sys.setprofile(before)
        return made

    assert 0 < calls(4000) < 3 * calls(2000)


def test_pitfall_21_groups_travel_as_columns_not_as_text() -> None:
    group: Any = a_group(*map(float, range(16)), length=512, inference_logprobs=[[1.0, 1.0] + [-0.123456] * 510] * 16)
    columns = wire_group(
        group, group_id="g", env_id=0, run_id="r", ticket=None, origins={}, fallback_version=0
    )  # fmt: skip

    size_bytes = len(encode_group(columns))

    assert size_bytes < 10 * 16 * 512
    assert size_bytes < len(json.dumps(group)) / 2
