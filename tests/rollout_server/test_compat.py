"""The old Atropos routes: the forms that old clients read, and what is better than it was."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from atroposlib.wire.columns import encode_group
from rollout_server.config import ServerConfig
from tests.builders import a_group
from tests.compat.old_bodies import ENV, REGISTRATION, numbers, old_group
from tests.processes import rollout_server_on_a_thread

FOURTEEN = {
    "tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params", "inference_logprobs",
    "overrides", "group_overrides", "images", "env_id", "distill_token_ids", "distill_logprobs",
}  # fmt: skip
UNREGISTERED = {"status": "error", "message": "Trainer not registered. Call /register first.", "batch": []}


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    config = ServerConfig(port=0, store="memory", max_queued_bytes=1 << 20, max_group_sequences=64)
    with rollout_server_on_a_thread(config) as url, httpx.Client(base_url=url, headers={"Accept-Encoding": ""}) as http:
        yield http


@pytest.fixture
def joined(http: httpx.Client) -> httpx.Client:
    """A server with a trainer and an environment."""
    http.post("/register", json=REGISTRATION).raise_for_status()
    http.post("/register-env", json=ENV).raise_for_status()
    return http


def post(http: httpx.Client, *groups: dict[str, Any]) -> None:
    assert http.post("/scored_data_list", json=list(groups)).json()["status"] == "received"


def test_before_a_trainer_registered_everything_says_so(http: httpx.Client) -> None:
    assert http.get("/").json() == {"message": "AtroposLib API"}
    assert http.get("/info").json() == {"batch_size": -1, "max_token_len": -1}
    assert http.get("/wandb_info").json() == {"group": None, "project": None}
    assert http.get("/status").json() == {"current_step": 0, "queue_size": 0}
    assert http.post("/register-env", json=ENV).json() == {"status": "wait for trainer to start"}
    assert http.get("/batch").json() == UNREGISTERED


def test_registering_makes_the_run_known(http: httpx.Client) -> None:
    answer = http.post("/register", json=REGISTRATION).json()

    assert set(answer) == {"uuid"}
    assert isinstance(answer["uuid"], int)
    assert http.get("/info").json() == {"batch_size": 4, "max_token_len": 64}
    assert http.get("/wandb_info").json() == {"group": "g", "project": "p"}
    assert http.get("/batch").content == b'{"batch":null}'


def test_an_environment_registers_as_soon_as_a_trainer_did(http: httpx.Client) -> None:
    http.post("/register", json=REGISTRATION | {"starting_step": 3})

    assert http.post("/register-env", json=ENV).json() == {
        "status": "success", "env_id": 0, "wandb_name": "env_0", "checkpoint_dir": "/c", "starting_step": 3,
        "checkpoint_interval": 10, "num_steps": 5,
    }  # fmt: skip
    assert http.post("/register-env", json=ENV).json()["wandb_name"] == "env_1"
    assert http.post("/register-env", json=ENV | {"desired_name": "other"}).json()["wandb_name"] == "other_0"
    assert http.post("/register-env", json=ENV).json()["env_id"] == 3


@pytest.mark.parametrize(
    "loose",
    [
        {"desired_name": None, "weight": None},
        {"desired_name": ""},
        {"weight": -1, "min_batch_allocation": 7.5},
        {"group_size": "2", "max_token_length": 64.0},
        {"desired_name": "n" * 500},
    ],
)
def test_loose_environment_registrations_are_taken(joined: httpx.Client, loose: dict[str, Any]) -> None:
    assert joined.post("/register-env", json=ENV | loose).json()["status"] == "success"


def test_a_registration_may_leave_out_its_names(http: httpx.Client) -> None:
    nameless = {key: value for key, value in REGISTRATION.items() if not key.startswith("wandb")}

    assert http.post("/register", json=nameless | {"wandb_project": None}).status_code == 200
    assert http.get("/wandb_info").json() == {"group": None, "project": None}


def test_groups_come_back_whole_and_in_order(joined: httpx.Client) -> None:
    assert joined.post("/scored_data", json=old_group(1.0)).json() == {"status": "received"}
    answer = joined.post("/scored_data_list", json=[old_group(2.0), old_group(3.0)]).json()
    assert answer == {"status": "received", "groups_processed": 2}
    assert joined.get("/status").json() == {"current_step": 0, "queue_size": 3}

    batch = joined.get("/batch").json()["batch"]

    assert numbers(batch) == [1.0, 2.0]
    assert all(set(group) == FOURTEEN for group in batch)
    assert batch[0] == {key: old_group(1.0).get(key) for key in FOURTEEN}
    assert joined.get("/status").json() == {"current_step": 1, "queue_size": 1}
    assert joined.get("/batch").json() == {"batch": None}


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/json; charset=utf-8"])
def test_json_is_json_whatever_the_content_type(joined: httpx.Client, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}

    answer = joined.post("/scored_data", content=json.dumps(old_group()), headers=headers)

    assert answer.json() == {"status": "received"}


def test_gzip_is_undone(joined: httpx.Client) -> None:
    body = gzip.compress(json.dumps(old_group()).encode())

    answer = joined.post("/scored_data", content=body, headers={"Content-Encoding": "GZip"})

    assert answer.json() == {"status": "received"}


@pytest.mark.parametrize("body", [b"no gzip", gzip.compress(b"{}")[:-4]], ids=["noise", "truncated"])
def test_broken_gzip_is_answered_as_ever(joined: httpx.Client, body: bytes) -> None:
    answer = joined.post("/scored_data", content=body, headers={"Content-Encoding": "gzip"})

    assert (answer.status_code, answer.text) == (400, "Invalid gzip payload")


def test_long_answers_are_compressed_for_those_who_ask(joined: httpx.Client) -> None:
    post(joined, *(old_group(float(i), n=32) for i in range(2)))
    joined.post("/register", json=REGISTRATION | {"batch_size": 64})

    short = joined.get("/info", headers={"Accept-Encoding": "gzip"})
    long = joined.get("/batch", headers={"Accept-Encoding": "gzip, deflate"})
    example = joined.get("/latest_example", headers={"Accept-Encoding": "gzip"})

    assert "content-encoding" not in short.headers
    assert (long.headers["content-encoding"], example.headers["content-encoding"]) == ("gzip", "gzip")
    assert numbers(long.json()["batch"]) == [0.0, 1.0]
    assert example.json()["scores"][0] == 1.0


def test_short_batches_are_not_compressed(joined: httpx.Client) -> None:
    post(joined, old_group(n=4))

    answer = joined.get("/batch", headers={"Accept-Encoding": "gzip"})

    assert "content-encoding" not in answer.headers
    assert len(answer.json()["batch"]) == 1


def test_a_large_batch_comes_in_pieces_and_whole(joined: httpx.Client) -> None:
    tokens = list(range(20_000))
    wide = {"tokens": [tokens] * 2, "masks": [tokens] * 2, "advantages": [[0.1] * 20_000] * 2}
    sent = [old_group(float(i)) | {"inference_logprobs": None} | wide for i in range(2)]
    joined.post("/register", json=REGISTRATION | {"max_token_len": 20_000})
    post(joined, *sent)

    batch = joined.get("/batch", headers={"Accept-Encoding": "gzip"}).json()["batch"]

    assert [{key: group[key] for key in wide} for group in batch] == [wide, wide]


def test_the_latest_example_is_the_last_group(http: httpx.Client) -> None:
    empty = http.get("/latest_example").json()
    post(http, old_group(1.0), old_group(2.0))

    assert len(empty) == 9
    assert set(map(str, empty.values())) == {"[]"}
    assert http.get("/latest_example").json() == {key: old_group(2.0).get(key) for key in FOURTEEN}


def test_groups_without_an_environment_are_taken_and_come_back_so(joined: httpx.Client) -> None:
    post(joined, old_group(1.0, env_id=None), old_group(2.0, env_id=77))

    batch = joined.get("/batch").json()["batch"]

    assert [group["env_id"] for group in batch] == [None, 77]


def test_groups_of_strangers_weigh_in_the_queue_of_everybody(joined: httpx.Client) -> None:
    post(joined, old_group(1.0, env_id=None), old_group(2.0, env_id=77), old_group(3.0))

    figures = joined.get("/status-env", params={"env_id": 0}).json()

    assert (figures["queue_size"], figures["self_queue_size"], figures["max_group_size"]) == (3, 1, 2)


def test_status_env_answers_the_same_however_it_is_asked(joined: httpx.Client) -> None:
    by_body = joined.request("GET", "/status-env", json={"env_id": 0}).json()

    assert by_body == {
        "current_step": 0, "queue_size": 0, "unallocated_fraction": 1.0, "self_queue_size": 0, "max_group_size": 1,
        "env_weight": 1.0,
    }  # fmt: skip
    # Old schedulers count with these; 0.0 would be no count.
    assert {key for key, value in by_body.items() if isinstance(value, float)} == {"unallocated_fraction", "env_weight"}
    assert joined.get("/status-env", params={"env_id": 0}).json() == by_body
    assert joined.post("/status-env", json={"env_id": 0}).json() == by_body
    assert joined.request("GET", "/status-env", json={"env_id": 9}).json() == by_body
    assert joined.get("/status-env", params={"env_id": "x"}).status_code == 422


def test_an_environment_without_weight_gets_the_least_and_takes_nothing(joined: httpx.Client) -> None:
    joined.post("/register-env", json=ENV | {"weight": -1})

    weights = [joined.get("/status-env", params={"env_id": i}).json()["env_weight"] for i in range(2)]

    assert weights == [1.0, 0.01]


def test_disconnecting_says_whether_there_was_anything_to_disconnect(joined: httpx.Client) -> None:
    joined.post("/register-env", json=ENV)

    gone = joined.post("/disconnect-env", json={"env_id": 1}).json()
    unknown = joined.post("/disconnect-env", json={"env_id": 9})

    assert gone == {"status": "success"}
    assert (unknown.status_code, unknown.json()["status"], set(unknown.json())) == (200, "failure", {"status", "error"})
    assert joined.get("/status-env", params={"env_id": 0}).json()["env_weight"] == 1.0


@pytest.mark.parametrize(
    ("changes", "location"),
    [
        ({"masks": [[1], [1]]}, ["body", "masks"]),
        ({"scores": [1.0]}, ["body", "scores"]),
        ({"tokens": [["a"], ["b"]]}, ["body", "tokens", 0, 0]),
        ({"tokens": [], "masks": [], "scores": []}, ["body", "tokens"]),
        ({"inference_logprobs": [[1.0, None, 1.0], [1.0, 1.0, 1.0]]}, ["body", "inference_logprobs", 0, 1]),
        ({"tokens": [[1, 2, -3], [1, 2, 4]]}, ["body"]),
        ({"env_id": "x"}, ["body", "env_id"]),
    ],
)
def test_a_group_that_does_not_fit_is_refused_by_place(
    joined: httpx.Client, changes: dict[str, Any], location: list[str | int]
) -> None:
    single = joined.post("/scored_data", json=old_group() | changes)
    listed = joined.post("/scored_data_list", json=[old_group(1.0), old_group() | changes])

    (error,) = single.json()["detail"]
    assert (single.status_code, listed.status_code) == (422, 422)
    assert set(error) == {"type", "loc", "msg", "input"}
    assert error["loc"] == location
    assert listed.json()["detail"][0]["loc"] == ["body", 1, *location[1:]]
    assert joined.get("/status").json()["queue_size"] == 0


@pytest.mark.parametrize("field", ["scores", "inference_logprobs", "advantages", "ref_logprobs"])
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_on_entry(joined: httpx.Client, field: str, value: str) -> None:
    rows = f"[{value}, 0]" if field == "scores" else f"[[1, 1, {value}], [1, 1, 0]]"
    body = f'{json.dumps(old_group())[:-1]}, "{field}": {rows}}}'

    answer = joined.post("/scored_data", content=body)

    assert answer.status_code == 422
    assert field in answer.json()["detail"][0]["msg"]


def test_missing_fields_are_named_as_fastapi_names_them(joined: httpx.Client) -> None:
    group = joined.post("/scored_data", json={"tokens": [[1]], "masks": [[1]]}).json()["detail"]
    trainer = joined.post("/register", json={}).json()["detail"]
    empty = joined.post("/register", content=b"").json()["detail"]

    assert [(error["type"], error["loc"]) for error in group] == [("missing", ["body", "scores"])]
    assert {error["loc"][1] for error in trainer} == set(REGISTRATION) - {"wandb_group", "wandb_project"}
    assert [(error["type"], error["loc"]) for error in empty] == [("missing", ["body"])]


def test_limits_of_the_server_hold_for_old_clients(joined: httpx.Client) -> None:
    answer = joined.post("/scored_data", json=old_group(n=65))

    assert answer.status_code == 422
    assert "max_group_sequences=64" in answer.json()["detail"][0]["msg"]


def test_a_full_queue_is_a_503_so_that_old_environments_try_again(joined: httpx.Client) -> None:
    joined.post("/register", json=REGISTRATION | {"max_token_len": 1 << 20})
    wide = {"tokens": [[1] * 100_000] * 2, "masks": [[1] * 100_000] * 2, "inference_logprobs": None}

    answers = [joined.post("/scored_data", json=old_group(float(i)) | wide) for i in range(2)]

    assert [answer.status_code for answer in answers] == [200, 503]
    assert answers[1].headers["retry-after"] == "1"


def test_wrong_methods_and_paths_are_answered_as_ever(http: httpx.Client) -> None:
    wrong, unknown = http.get("/register"), http.get("/nothing")

    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})
    assert (unknown.status_code, unknown.json()) == (404, {"detail": "Not Found"})


def test_data_that_comes_before_any_trainer_is_kept(http: httpx.Client) -> None:
    post(http, old_group(1.0), old_group(2.0))
    assert http.get("/batch").json() == UNREGISTERED
    http.post("/register", json=REGISTRATION)

    assert numbers(http.get("/batch").json()["batch"]) == [1.0, 2.0]


def test_a_group_sent_again_is_kept_once_and_answered_alike(joined: httpx.Client) -> None:
    first = joined.post("/scored_data_list", json=[old_group(1.0), old_group(2.0)]).json()

    again = joined.post("/scored_data_list", json=[old_group(1.0), old_group(2.0)]).json()

    assert again == first
    assert joined.get("/status").json()["queue_size"] == 2
    assert joined.get("/v1/status").json()["groups_duplicate"] == 2


def test_equal_groups_of_one_request_are_all_kept(joined: httpx.Client) -> None:
    post(joined, old_group(), old_group())

    assert joined.get("/status").json()["queue_size"] == 2


def test_groups_of_odd_sizes_hold_nothing_up(joined: httpx.Client) -> None:
    post(joined, old_group(1.0, n=3), old_group(2.0), old_group(3.0), old_group(4.0, n=1))

    batches = [numbers(joined.get("/batch").json()["batch"]) for _ in range(2)]

    assert sorted(batches) == [[1.0, 4.0], [2.0, 3.0]]


def test_a_second_registration_applies_its_settings_and_keeps_queue_and_environments(joined: httpx.Client) -> None:
    post(joined, old_group(1.0), old_group(2.0), old_group(3.0))

    joined.post("/register", json=REGISTRATION | {"batch_size": 6, "max_token_len": 128, "num_steps": 9})

    assert joined.get("/info").json() == {"batch_size": 6, "max_token_len": 128}
    assert numbers(joined.get("/batch").json()["batch"]) == [1.0, 2.0, 3.0]
    assert joined.post("/register-env", json=ENV).json()["num_steps"] == 9
    assert joined.post("/register-env", json=ENV).json()["env_id"] == 2


def test_another_batch_size_gives_the_batch_in_hand_back_to_the_queue(joined: httpx.Client) -> None:
    post(joined, *(old_group(float(i)) for i in range(3)))
    assert numbers(joined.get("/batch").json()["batch"]) == [0.0, 1.0]

    joined.post("/register", json=REGISTRATION | {"batch_size": 6})

    assert numbers(joined.get("/batch").json()["batch"]) == [0.0, 1.0, 2.0]
    assert joined.get("/status").json()["current_step"] == 1


def test_a_trainer_that_is_ahead_moves_the_run_forward(joined: httpx.Client) -> None:
    post(joined, old_group(1.0), old_group(2.0))
    joined.get("/batch")

    joined.post("/register", json=REGISTRATION | {"starting_step": 3})

    assert joined.get("/status").json() == {"current_step": 3, "queue_size": 2}
    assert numbers(joined.get("/batch").json()["batch"]) == [1.0, 2.0]
    assert joined.get("/status").json()["current_step"] == 4


def test_another_run_starts_clean_and_the_living_keep_their_env_ids(joined: httpx.Client) -> None:
    for _ in range(2):
        joined.post("/register-env", json=ENV)
    joined.post("/disconnect-env", json={"env_id": 0})
    post(joined, old_group(1.0), old_group(2.0))

    joined.post("/register", json=REGISTRATION | {"wandb_group": "other"})

    assert joined.get("/status").json() == {"current_step": 0, "queue_size": 0}
    envs = joined.get("/v1/status").json()["envs"]
    assert [(env["env_id"], env["name"], env["is_connected"]) for env in envs] == [
        (0, "env_0", False), (1, "env_1", True), (2, "env_2", True),
    ]  # fmt: skip
    assert joined.post("/register-env", json=ENV).json()["env_id"] == 3


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_reset_starts_clean_and_the_living_keep_their_env_ids(joined: httpx.Client, method: str) -> None:
    post(joined, old_group(1.0), old_group(2.0))

    answer = joined.request(method, "/reset_data")

    assert (answer.text, answer.headers["content-type"].split(";")[0]) == ("Reset successful", "text/plain")
    assert joined.get("/info").json() == {"batch_size": -1, "max_token_len": -1}
    assert joined.get("/batch").json() == UNREGISTERED
    assert joined.get("/status-env", params={"env_id": 0}).json()["env_weight"] > 0
    assert joined.post("/register-env", json=ENV).json()["status"] == "wait for trainer to start"
    post(joined, old_group(3.0), old_group(4.0))
    joined.post("/register", json=REGISTRATION)
    assert numbers(joined.get("/batch").json()["batch"]) == [3.0, 4.0]
    assert joined.post("/register-env", json=ENV).json()["env_id"] == 1


def test_a_reset_without_a_run_is_no_error(http: httpx.Client) -> None:
    assert [http.get("/reset_data").text for _ in range(2)] == ["Reset successful"] * 2


def test_a_trainer_that_goes_beyond_its_number_of_steps_gets_its_batches(http: httpx.Client) -> None:
    http.post("/register", json=REGISTRATION | {"num_steps": 1, "starting_step": 7})
    post(http, *(old_group(float(i)) for i in range(4)))

    batches = [numbers(http.get("/batch").json()["batch"]) for _ in range(3)]

    assert batches == [[0.0, 1.0], [2.0, 3.0], []]
    assert http.get("/status").json()["current_step"] == 9


def test_a_trainer_without_a_number_of_steps_has_no_end(http: httpx.Client) -> None:
    http.post("/register", json=REGISTRATION | {"num_steps": -1})

    assert http.post("/register-env", json=ENV).json()["num_steps"] == -1


def test_an_old_trainer_takes_nothing_from_a_run_of_the_native_routes(http: httpx.Client) -> None:
    run = http.post("/v1/run", json={"run_name": "mine", "batch_size": 2, "num_steps": 5, "max_staleness": 9}).json()
    http.post("/v1/envs", json={"name": "env", "group_size": 2})
    http.post("/v1/policy", json={"session": run["session"], "policy_version": 0})
    http.post(
        "/v1/groups", content=encode_group(a_group()), headers={"Content-Type": "application/vnd.atropos.groups"}
    ).raise_for_status()

    answer = http.get("/batch").json()

    assert (answer["status"], answer["batch"]) == ("error", [])
    assert "mine" in answer["message"]
    assert http.get("/v1/status").json()["formed_steps"] == 0


def test_environments_of_the_native_routes_feed_an_old_trainer(http: httpx.Client) -> None:
    http.post("/register", json=REGISTRATION | {"batch_size": 2})
    env = http.post("/v1/envs", json={"name": "native", "group_size": 2}).json()
    ticket = {"env_id": env["env_id"], "session": env["session"], "sequences": 2, "wait_s": 0}

    (granted,) = http.post("/v1/tickets", json=ticket).json()["tickets"]
    blob = encode_group(a_group(ticket=granted["ticket"], version=granted["policy_version"]))
    http.post("/v1/groups", content=blob, headers={"Content-Type": "application/vnd.atropos.groups"}).raise_for_status()

    (group,) = http.get("/batch").json()["batch"]
    assert set(group) == FOURTEEN
    assert group["masks"][0][:3] == [-100] * 3
    http.get("/batch")
    assert http.get("/v1/status").json()["policy_version"] == 1
