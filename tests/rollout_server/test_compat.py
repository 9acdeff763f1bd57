"""The old Atropos routes, used in the order in which old clients use them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.processes import RolloutServerProcess

REGISTRATION = {
    "wandb_group": "g", "wandb_project": "p", "batch_size": 4, "max_token_len": 64, "checkpoint_dir": "/c",
    "save_checkpoint_interval": 10, "starting_step": 0, "num_steps": 5,
}  # fmt: skip
ENV = {"max_token_length": 64, "desired_name": "env", "weight": 1.0, "group_size": 2}


def group(env_id: int = 0, score: float = 1.0) -> dict[str, Any]:
    return {
        "tokens": [[1, 2, 3], [1, 2, 4]],
        "masks": [[-100, -100, 3], [-100, -100, 4]],
        "scores": [score, 0.0],
        "inference_logprobs": [[1.0, 1.0, -0.5], [1.0, 1.0, -0.25]],
        "env_id": env_id,
        "unknown_extra": 1,
    }


@pytest.fixture
def http(rollout_server: RolloutServerProcess) -> Any:
    with httpx.Client(base_url=rollout_server.url) as http:
        yield http


def test_an_old_environment_and_an_old_trainer_work_together(http: httpx.Client) -> None:
    assert http.get("/").json() == {"message": "AtroposLib API"}
    assert http.get("/info").json() == {"batch_size": -1, "max_token_len": -1}
    assert http.get("/wandb_info").json() == {"group": None, "project": None}
    assert http.post("/register-env", json=ENV).json() == {"status": "wait for trainer to start"}
    assert http.get("/batch").json()["batch"] == []
    assert isinstance(http.post("/register", json=REGISTRATION).json()["uuid"], int)
    env = http.post("/register-env", json=ENV).json()
    assert (env["status"], env["env_id"], env["wandb_name"], env["num_steps"]) == ("success", 0, "env_0", 5)
    assert http.get("/batch").json() == {"batch": None}

    assert http.post("/scored_data", json=group()).json() == {"status": "received"}
    assert http.post("/scored_data_list", json=[group(score=0.5)]).json()["groups_processed"] == 1
    assert http.get("/status").json() == {"current_step": 0, "queue_size": 2}
    batch = http.get("/batch").json()["batch"]

    assert [item["scores"] for item in batch] == [[1.0, 0.0], [0.5, 0.0]]
    assert batch[0]["masks"] == group()["masks"]
    assert batch[0]["inference_logprobs"] == group()["inference_logprobs"]
    assert batch[0]["overrides"] is None
    assert http.get("/batch").json() == {"batch": None}
    assert http.get("/status").json()["current_step"] == 1


def test_status_env_answers_with_six_keys_however_it_is_asked(http: httpx.Client) -> None:
    http.post("/register", json=REGISTRATION)
    http.post("/register-env", json=ENV)

    by_body = http.request("GET", "/status-env", json={"env_id": 0}).json()

    assert set(by_body) == {
        "current_step", "queue_size", "unallocated_fraction", "self_queue_size", "max_group_size", "env_weight",
    }  # fmt: skip
    assert http.get("/status-env", params={"env_id": 0}).json() == by_body
    assert http.get("/status-env", params={"env_id": 9}).json()["env_weight"] == 0.0


def test_a_malformed_group_is_a_422_with_a_detail_and_costs_nothing(http: httpx.Client) -> None:
    http.post("/register", json=REGISTRATION)
    http.post("/register-env", json=ENV)

    ragged = http.post("/scored_data", json=group() | {"masks": [[1]]})
    missing = http.post("/scored_data", json={"tokens": [[1]]})

    assert ragged.status_code == missing.status_code == 422
    assert "masks has rows" in ragged.json()["detail"]
    assert isinstance(missing.json()["detail"], list)
    assert http.get("/status").json()["queue_size"] == 0
