"""Old clients as the old library wrote them: the same requests, in the same order, reading the same keys."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

GZIP_FROM_BYTES = 1024
ATTEMPTS = 3
DEADLINE_S = 20.0
PAUSE_S = 0.02
"""Old clients pause for 0.1 to 5 s; tests need not."""


def eventually(look: Any) -> Any:
    """The first answer that is not None."""
    end = time.monotonic() + DEADLINE_S
    while (found := look()) is None:
        assert time.monotonic() < end, "the server did not come to what the client waits for"
        time.sleep(PAUSE_S)
    return found


@dataclass
class OldEnvironment:
    """The loop of BaseEnv: register, then ask for the status again and again, and send a group whenever it says so."""

    url: str
    group_size: int = 2
    max_batches_offpolicy: int = 2
    min_batch_allocation: float | None = None
    name: str | None = "old_env"
    env_id: int = -1
    batch_size: int = -1
    total_steps: int = -1
    steps_seen: list[int] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    def call(self, method: str, path: str, payload: Any = None) -> Any:
        """One request on a connection of its own; server errors are tried again, others end the environment."""
        body, headers = b"", {}
        if payload is not None:
            body, headers = json.dumps(payload).encode(), {"Content-Type": "application/json"}
            packed = gzip.compress(body)
            if method == "POST" and len(body) >= GZIP_FROM_BYTES and len(packed) < len(body):
                body, headers = packed, headers | {"Content-Encoding": "gzip"}
        for attempt in range(ATTEMPTS):
            try:
                with httpx.Client(base_url=self.url, timeout=DEADLINE_S) as http:
                    answer = http.request(method, path, content=body, headers=headers)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code < 500:
                break
            assert attempt < ATTEMPTS - 1, f"{path} failed {ATTEMPTS} times: the environment ends"
            time.sleep(0.5)
        assert answer is not None
        answer.raise_for_status()
        return answer.json()

    def start(self) -> None:
        """Wait for the project's name, register, ask for the batch size."""
        eventually(lambda: self.call("GET", "/wandb_info")["project"])
        registered = eventually(self._register)
        assert {"wandb_name", "checkpoint_dir", "starting_step", "checkpoint_interval"} <= set(registered)
        self.env_id, self.total_steps = registered["env_id"], registered["num_steps"]
        info = self.call("GET", "/info")
        self.batch_size = info["batch_size"]
        assert isinstance(info["max_token_len"], int)

    def _register(self) -> dict[str, Any] | None:
        answer: dict[str, Any] = self.call(
            "POST",
            "/register-env",
            {
                "max_token_length": 64, "desired_name": self.name, "weight": 1.0, "group_size": self.group_size,
                "min_batch_allocation": self.min_batch_allocation,
            },
        )  # fmt: skip
        return answer if answer["status"] == "success" else None

    def step(self) -> bool:
        """One turn of the loop; False when the run is over."""
        status = self.call("GET", "/status-env", {"env_id": self.env_id})
        queue, step = status["queue_size"], status["current_step"]
        assert status["max_group_size"] >= 1
        assert status["self_queue_size"] >= 0
        assert 0.01 <= status["env_weight"] <= 1.0
        self.steps_seen.append(step)
        if step + (queue * self.group_size) // self.batch_size > self.total_steps:
            return False
        share = status["unallocated_fraction"] + (self.min_batch_allocation or 0.0)
        limit = self.max_batches_offpolicy * int(self.batch_size * share) // self.group_size - queue
        if limit > 0:
            self.send([self.new_group() for _ in range(min(limit, 2))])
        return True

    def new_group(self) -> dict[str, Any]:
        """A finished rollout, with the extras that environments send."""
        number = self.env_id * 10_000.0 + len(self.sent)
        self.sent.append(number)
        n = self.group_size
        return {
            "tokens": [[1, 2, *range(10, 20 + i)] for i in range(n)],
            "masks": [[-100, -100, *range(10, 20 + i)] for i in range(n)],
            "scores": [number, *([0.0] * (n - 1))],
            "advantages": None,
            "ref_logprobs": None,
            "messages": [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "reward": 1}]] * n,
            "generation_params": {"temperature": 1.0},
            "inference_logprobs": [[1.0, 1.0, *([-0.5] * (10 + i))] for i in range(n)],
            "overrides": [{"set_advantage_to_zero": True}] * n,
            "group_overrides": {"group_size": n},
            "ground_truths": ["extra"] * n,
            "images": None,
            "env_id": self.env_id,
        }

    def send(self, groups: Sequence[dict[str, Any]]) -> None:
        """One group alone, several as a list."""
        if len(groups) == 1:
            assert self.call("POST", "/scored_data", groups[0])["status"] in ("received", "buffered")
        else:
            answer = self.call("POST", "/scored_data_list", list(groups))
            assert answer["groups_processed"] == len(groups)


@dataclass
class OldExampleTrainer:
    """Registers once the server answers, then collects batches until there is none."""

    url: str
    batch_size: int = 4
    num_steps: int = 5

    def register(self) -> None:
        """Wait for the server, then register."""
        with httpx.Client(base_url=self.url, timeout=DEADLINE_S) as http:
            eventually(lambda: True if http.get("/info").status_code == 200 else None)
            answer = http.post(
                "/register",
                json={
                    "wandb_group": "", "wandb_project": "test", "batch_size": self.batch_size, "max_token_len": 64,
                    "starting_step": 0, "checkpoint_dir": "ckpt", "save_checkpoint_interval": 5,
                    "num_steps": self.num_steps,
                },
            ).json()  # fmt: skip
            assert isinstance(answer["uuid"], int)

    def collect(self) -> list[list[float]]:
        """Every batch that there is now, as the numbers of its groups."""
        batches = []
        with httpx.Client(base_url=self.url, timeout=10.0) as http:
            while (batch := self._batch(http)) is not None:
                batches.append([self._train_on(group) for group in batch])
                assert sum(len(group["tokens"]) for group in batch) == self.batch_size
        return batches

    @staticmethod
    def _batch(http: httpx.Client) -> list[dict[str, Any]] | None:
        answer = http.get("/batch").json()
        assert answer.get("status") != "error", answer
        batch: list[dict[str, Any]] | None = answer["batch"]
        return batch

    @staticmethod
    def _train_on(group: dict[str, Any]) -> float:
        """Reads what the trainer reads, by index and without a guard."""
        for i, tokens in enumerate(group["tokens"]):
            assert len(tokens) == len(group["masks"][i]) == len(group["inference_logprobs"][i])
            assert [
                logprob
                for logprob, label in zip(group["inference_logprobs"][i], group["masks"][i], strict=True)
                if label == -100
            ] == [1.0, 1.0]
            assert group["overrides"][i].get("set_advantage_to_zero", False) is True
        assert group["generation_params"]["temperature"] == 1.0
        assert group["group_overrides"] is not None
        number: float = group["scores"][0]
        return number


@dataclass
class OldPollingPlugin:
    """Polls for batches before it registers, takes whatever is no JSON for nothing, and never looks at statuses."""

    url: str
    batch_size: int = 4

    def poll(self) -> list[float] | None:
        """One poll; None when there was nothing."""
        with httpx.Client(base_url=self.url, timeout=10.0) as http:
            try:
                batch = http.get("/batch").json()["batch"]
            except ValueError:
                return None
        if not batch:
            return None
        for group in batch:
            assert all(override is None or "set_advantage_to_zero" in override for override in group["overrides"] or [])
            prefix = next(i for i in range(99) if len({tuple(tokens[: i + 1]) for tokens in group["tokens"]}) > 1)
            assert prefix >= 2, "the prompt is the common prefix of the group"
        return [group["scores"][0] for group in batch]

    def register(self) -> None:
        """As configured; names may be null, and the answer's status is not looked at."""
        with httpx.Client(base_url=self.url, timeout=10.0) as http:
            http.post(
                "/register",
                json={
                    "wandb_group": None, "wandb_project": None, "batch_size": self.batch_size, "max_token_len": 64,
                    "starting_step": 0, "checkpoint_dir": "out", "save_checkpoint_interval": 5, "num_steps": 5,
                },
            )  # fmt: skip
