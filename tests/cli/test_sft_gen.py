"""atropos-sft-gen and atropos-dpo-gen against a real rollout server, with an old environment that sends to it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from atroposlib.cli import dpo, generation, sft
from atroposlib.cli.old_routes import OwnRun, TrainerRegisteredError
from atroposlib.testing.byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from rollout_server.config import ServerConfig
from tests.compat.old_bodies import ENV, REGISTRATION
from tests.processes import free_port, rollout_server_on_a_thread


@pytest.fixture(scope="module")
def tokenizer_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(generation, "POLL_S", 0.02)
    with rollout_server_on_a_thread(ServerConfig(port=0, data_dir=tmp_path / "data")) as url:
        yield url


def a_group(number: int) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    prompt, *rows = (tokenizer.encode(text) for text in (f"{number}: ", "yes", "no"))
    return {
        "tokens": [prompt + row for row in rows],
        "masks": [[-100] * len(prompt) + row for row in rows],
        "scores": [1.0 + number, -1.0],
        "messages": [[{"role": "assistant", "content": text}] for text in ("yes", "no")],
    }


class OldEnvironment(threading.Thread):
    """Waits for a trainer and sends some groups."""

    def __init__(self, url: str, groups: int = 4) -> None:
        super().__init__()
        self.url, self.groups, self.registrations = url, groups, list[dict[str, Any]]()

    def run(self) -> None:
        with httpx.Client(base_url=self.url) as client:
            while client.post("/register-env", json=ENV).json()["status"] != "success":
                time.sleep(0.02)
            self.registrations.append(client.get("/info").json())
            for number in range(self.groups):
                client.post("/scored_data", json={**a_group(number), "env_id": 0})


def generate(main: Any, url: str, file: Path, *options: str, groups: int = 4) -> tuple[int, OldEnvironment]:
    environment = OldEnvironment(url, groups)
    environment.start()
    try:
        return main([str(file), "--api-url", url, *options]), environment
    finally:
        environment.join()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_best_texts_are_written_and_the_run_is_given_back(
    server: str, tokenizer_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "sft.jsonl"
    options = ("--tokenizer", tokenizer_name, "--tasks-per-step", "2", "--num-seqs-to-save", "3")

    status, environment = generate(sft.main, server, file, *options)

    assert status == 0
    assert lines(file) == [{"prefix": f"{i}: ", "completion": "yes", "score": 1.0 + i} for i in range(3)]
    assert environment.registrations == [{"batch_size": 4, "max_token_len": 2048}]
    assert httpx.get(f"{server}/info").json()["batch_size"] == -1, "a trainer may come now"
    assert "3 lines written" in capsys.readouterr().out


def test_not_a_line_more_is_written_than_asked_for(server: str, tokenizer_name: str, tmp_path: Path) -> None:
    file = tmp_path / "sft.jsonl"
    options = ("--tokenizer", tokenizer_name, "--tasks-per-step", "2", "--num-seqs-to-save", "3")

    status, _ = generate(sft.main, server, file, *options, "--allow-negative-scores")

    assert status == 0
    assert [line["score"] for line in lines(file)] == [1.0, -1.0, 2.0], "a group gives two lines here"


class RecordedRoutes:
    """A server of old with a trainer: it takes a registration only after a reset."""

    def __init__(self) -> None:
        self.url, self.calls, self.group = "http://old:8000", list[str](), "somebody"

    def get(self, path: str) -> Any:
        self.calls.append(path)
        if path == "/reset_data":
            self.group = ""
        return {"batch_size": 8 if self.group else -1, "group": self.group}

    def post(self, path: str, body: dict[str, Any]) -> None:
        self.calls.append(path)
        self.group = self.group or body["wandb_group"]


@pytest.mark.parametrize("is_forced", [True, False])
def test_the_run_of_another_is_reset_only_by_force(is_forced: bool) -> None:
    routes: Any = RecordedRoutes()
    run = OwnRun(routes, "gen")

    with contextlib.nullcontext() if is_forced else pytest.raises(TrainerRegisteredError, match="'somebody'"):
        run.open(batch_size=4, max_token_len=8, num_steps=0, is_forced=is_forced)

    assert ("/reset_data" in routes.calls) is is_forced
    assert (routes.group == run.group) is is_forced


def test_at_the_end_the_run_of_somebody_else_is_left_alone() -> None:
    routes: Any = RecordedRoutes()

    OwnRun(routes, "gen").close()

    assert routes.group == "somebody"


def test_pairs_are_written_and_added_to_a_file(server: str, tmp_path: Path) -> None:
    file = tmp_path / "dpo.jsonl"
    file.write_text('{"old": 1}\n')
    options = ("--save-messages", "--append-to-previous", "--num-seqs-to-save", "8")

    status, _ = generate(dpo.main, server, file, *options, groups=8)

    assert status == 0
    first, *rest = lines(file)
    assert first == {"old": 1}
    assert len(rest) == 8
    assert rest[0] == {
        "pos": [{"role": "assistant", "content": "yes"}],
        "score": 1.0,
        "neg": [{"role": "assistant", "content": "no"}],
    }


@pytest.mark.parametrize("main", [sft.main, dpo.main])
def test_an_existing_file_is_refused_before_the_server_is_asked(
    main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "there.jsonl"
    file.write_text("mine\n")

    assert main([str(file), "--api-url", f"http://127.0.0.1:{free_port()}"]) == 1

    assert "exists already" in capsys.readouterr().err
    assert file.read_text() == "mine\n"


def test_a_run_of_a_trainer_is_left_alone(
    server: str, tokenizer_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    httpx.post(f"{server}/register", json=REGISTRATION)
    httpx.post(f"{server}/register-env", json=ENV)
    httpx.post(f"{server}/scored_data", json={**a_group(1), "env_id": 0})

    assert sft.main([str(tmp_path / "sft.jsonl"), "--api-url", server, "--tokenizer", tokenizer_name]) == 1

    assert "a trainer is registered" in capsys.readouterr().err
    assert httpx.get(f"{server}/status").json() == {"current_step": 0, "queue_size": 1}
    assert httpx.get(f"{server}/wandb_info").json()["group"] == "g"
    assert not (tmp_path / "sft.jsonl").exists(), "the next try is not refused because of this one"


def test_force_ends_that_run(server: str, tokenizer_name: str, tmp_path: Path) -> None:
    httpx.post(f"{server}/register", json=REGISTRATION)
    options = ("--tokenizer", tokenizer_name, "--tasks-per-step", "2", "--num-seqs-to-save", "1", "--force")
    file = tmp_path / "sft.jsonl"

    with rollout_is_registered(server):
        status = sft.main([str(file), "--api-url", server, *options])

    assert status == 0
    assert len(lines(file)) == 1


class rollout_is_registered:  # noqa: N801 - reads as a sentence
    """An environment that sends once our own registration is there."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.thread.join()

    def _send(self) -> None:
        with httpx.Client(base_url=self.url) as client:
            while not str(client.get("/wandb_info").json()["group"]).startswith("atropos-sft-gen"):
                time.sleep(0.02)
        environment = OldEnvironment(self.url)
        environment.run()


def test_without_batches_it_gives_up_and_says_why(
    server: str, tokenizer_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(tmp_path / "x.jsonl"), "--api-url", server, "--tokenizer", tokenizer_name, "--patience", "0.05"]

    assert sft.main(argv) == 1

    assert "is an environment connected" in capsys.readouterr().err
    assert httpx.get(f"{server}/info").json()["batch_size"] == -1


def test_a_server_that_is_away_is_one_line(
    tokenizer_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"

    assert dpo.main([str(tmp_path / "x.jsonl"), "--api-url", url, "--tokenizer", tokenizer_name]) == 1

    assert f"error: the rollout server at {url} does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (sft.main, ["--save-top-n-per-group", "--tasks-per-step"]),
        (dpo.main, ["--save-n-pairs-per-group"]),
    ],
)
def test_help_names_the_flags_of_old(main: Any, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])

    text = capsys.readouterr().out
    common = ["filepath", "--api-url", "--group-size", "--max-token-len", "--tokenizer", "--save-messages"]
    common += ["--num-seqs-to-save", "--allow-negative-scores", "--minimum-score-diff-max-min", "--append-to-previous"]
    assert [name for name in common + flags if name not in text] == []
