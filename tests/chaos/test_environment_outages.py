"""`python my_env.py serve` while everything around it dies in turn, and while it dies itself: no accepted group is lost or repeated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.wire.columns import decode_groups
from tests.chaos.publishing_trainer import read_history
from tests.chaos.test_sigkill import Victim, records_of
from tests.processes import RolloutServerProcess, free_port

ROOT = Path(__file__).parents[2]
DEADLINE_S = 40.0
LATENCY_S = 0.1

pytestmark = pytest.mark.timeout(180)


class Command:
    """A process that is killed and started again."""

    def __init__(self, log: Path, *words: str) -> None:
        self.log = log
        self._command = [sys.executable, *words]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=ROOT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def end(self) -> int:
        """SIGTERM; its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=15)


class Engine(Command):
    """`atropos mock-inference`: like a fresh vLLM it runs weights that nobody published."""

    def __init__(self, folder: Path, number: int) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        super().__init__(
            folder / f"engine-{number}.log",
            "-m", "atroposlib.cli.main", "mock-inference", "--port", str(port), "--weight-version", "default",
            "--one-of", "a", "--one-of", "b", "--latency", str(LATENCY_S), "--seed", str(number),
        )  # fmt: skip

    def start(self) -> None:
        super().start()
        until(self._answers)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=1.0).status_code == 200
        except httpx.TransportError:
            return False


class Run:
    """Two inference servers, a rollout server, a trainer and an environment, each a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = RolloutServerProcess(folder / "data", "--ticket-ttl-s", "3")
        self.engines = [Engine(folder, number) for number in range(2)]
        urls = [engine.url for engine in self.engines]
        self.trainer = Command(
            folder / "trainer.log", "-m", "tests.chaos.publishing_trainer", self.server.url, str(folder), *urls
        )
        config = folder / "env.yaml"
        config.write_text(yaml.safe_dump(self._config(urls)))
        self.env = Command(folder / "env.log", "tests/chaos/sdk_environment.py", "serve", "--config", str(config))
        self.spool = folder / "run" / "spool" / "letters.groups"

    def _config(self, urls: list[str]) -> dict[str, Any]:
        env = {
            "rollout_server_url": self.server.url,
            "tokenizer_name": save_byte_tokenizer(self.folder / "tokenizer"),
            "run_dir": str(self.folder / "run"),
            "total_steps": -1,
        }
        servers = [
            {"base_url": f"{url}/v1", "server_type": "vllm", "model_name": "mock", "timeout": 30} for url in urls
        ]
        return {"env": env, "openai": servers}

    def start(self) -> None:
        everybody: list[Victim] = [*self.engines, self.server, self.trainer, self.env]
        for one in everybody:
            one.start()
        self.goes_on(2)

    def stop(self) -> None:
        everybody: list[Victim] = [self.env, self.trainer, self.server, *self.engines]
        for one in everybody:
            if one is not self.server or self.server._process is not None:
                one.kill()

    @property
    def history(self) -> list[list[str]]:
        return read_history(self.folder)

    @property
    def ledger(self) -> list[str]:
        """The groups of which the environment knows that the server took them."""
        path = self.folder / "run" / "ledger" / "env-letters.jsonl"
        return [json.loads(line)["group_id"] for line in path.read_text().splitlines()]

    @property
    def spooled(self) -> list[str]:
        """The groups on disk. What is on its way when the environment is told to stop stays there for the next one."""
        if not self.spool.exists():
            return []
        return [group.group_id for group in decode_groups(self.spool.read_bytes())]

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.server.url}/v1/status", timeout=5).json()
        return answer

    def goes_on(self, steps: int) -> None:
        """Until this many more steps are trained, without anybody's help."""
        goal = len(self.history) + steps
        until(lambda: len(self.history) >= goal, self._explain)

    def waits_on_disk(self) -> None:
        """Until groups are scored that the server could not take."""
        until(lambda: self.spool.exists() and self.spool.stat().st_size > 0, self._explain)

    def _explain(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))


def until(condition: Callable[[], bool], explain: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"it never came to that\n{explain()}"
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    try:
        run.start()
        yield run
    finally:
        run.stop()


def check_books(run: Run) -> None:
    """Every accepted group is trained once or waits; the books of the three agree."""
    run.trainer.kill()
    history, ledger = run.history, run.ledger
    states = {record.group_id: record for record in records_of(run.server.url)}
    trained = [group_id for ids in history for group_id in ids]

    assert len(trained) == len(set(trained)), "a group was trained twice"
    assert len(ledger) == len(set(ledger)), "a group was accepted twice"
    assert set(trained) <= {*ledger, *run.spooled}, "the environment does not know of a group that was trained"
    assert {states[group_id].state for group_id in ledger} <= {"batched", "queued"}, "accepted, then given up"
    steps = {group_id: step for step, ids in enumerate(history) for group_id in ids}
    assert all(states[group_id].step == step for group_id, step in steps.items())


def test_it_goes_on_by_itself_whoever_dies_and_says_goodbye_at_the_end(run: Run) -> None:
    assert run.env.process is not None

    run.server.kill()
    run.waits_on_disk()
    run.server.start()
    run.goes_on(3)

    run.trainer.kill()
    until(lambda: run.status()["queued_groups"] > 0)
    run.trainer.start()
    run.goes_on(3)

    run.engines[0].kill()
    run.goes_on(3)
    run.engines[0].start()
    run.goes_on(3)
    until(lambda: httpx.get(f"{run.engines[0].url}/mock/stats").json()["totals"].get("generation_tokens", 0) > 0)

    assert run.env.process.poll() is None, "it has ended"
    assert run.env.end() == 0
    status = run.status()
    assert status["tickets_outstanding"] == 0
    assert [env["is_connected"] for env in status["envs"]] == [False]
    assert "Traceback" not in run.env.log.read_text()
    check_books(run)


def test_what_a_killed_environment_had_on_disk_is_delivered_once_by_the_next(run: Run) -> None:
    run.server.kill()
    run.waits_on_disk()
    run.env.kill()
    spooled = run.spooled
    run.server.start()

    run.env.start()
    until(lambda: set(spooled) <= set(run.ledger), run._explain)
    run.goes_on(3)

    assert run.env.end() == 0
    assert not set(spooled) & set(run.spooled)
    assert [run.ledger.count(group_id) for group_id in spooled] == [1] * len(spooled)
    check_books(run)
