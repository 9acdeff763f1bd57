"""Runs one old environment in every mode: serve for a trainer of today, serve for an old trainer, process, evaluate."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from atroposlib.client import RolloutClient
from atroposlib.testing.mock_inference import Prompt
from atroposlib.type_definitions import MASKED
from atroposlib.wire.columns import Group
from atroposlib.wire.models import RunRequest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
DEADLINE_S = 30.0
STEPS = 2
GROUPS_TO_PROCESS = 3
SUM = re.compile(r"[Ww]hat is (\d+) \+ (\d+)\?")


def answer(prompt: Prompt) -> str:
    """The mock's policy: sums are right for every other choice, or every other time one and the same thing is asked."""
    is_right = (prompt.index + int(prompt.key().rpartition("/")[2])) % 2 == 0
    text = prompt.text
    if "Name two numbers, " in text:
        first: str = re.findall(r"Name two numbers, (\d+) first", text)[-1]
        return f"{first} and 3"
    if "Guess a number" in text:
        return "5" if prompt.turn == 0 or not is_right else "7"
    left, right = SUM.findall(text)[-1]
    return str(int(left) + int(right) + (0 if is_right else 1))


@dataclass(frozen=True)
class Style:
    """One environment, and what a trainer must know of it."""

    script: str
    batch_size: int = 8
    flags: tuple[str, ...] = ()
    """Added in every mode; ENGINE stands for the inference server's URL, TOKENIZER for the tokenizer's folder."""
    wandb_project: str | None = None


@dataclass
class Process:
    """A mode of the environment, as `python file.py MODE ...`."""

    name: str
    folder: Path
    popen: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.folder / f"{self.name}.log").read_text()

    def end(self, deadline: float) -> int:
        """Its exit status, once it has ended by itself; -1 where it had not until the deadline."""
        try:
            return self.popen.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            return -1


@dataclass
class Life:
    """What came out of the four processes."""

    folder: Path
    statuses: dict[str, int] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    """As the trainer of today leased them."""
    old_groups: list[dict[str, Any]] = field(default_factory=list)
    """As the old trainer got them from GET /batch."""
    old_batch_sizes: list[int] = field(default_factory=list)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of the groups file that process wrote."""
        return [json.loads(line) for line in (self.folder / "process" / "groups.jsonl").read_text().splitlines()]

    def metrics(self, mode: str) -> dict[str, float] | None:
        """Of metrics.json; None where the mode wrote none."""
        path = self.folder / mode / "evals" / "metrics.json"
        if not path.exists():
            return None
        results: dict[str, float] = json.loads(path.read_text())["results"]["all"]
        return results


@dataclass
class World:
    """The servers that all environments share, one after the other."""

    engine_url: str
    unversioned_engine_url: str
    """An engine that knows nothing of policy versions, as an old trainer has it."""
    native_url: str
    old_url: str
    tokenizer: str

    def live(self, style: Style, folder: Path) -> Life:
        """Run every mode at the same time."""
        life, deadline = Life(folder), time.monotonic() + DEADLINE_S
        serve = ("--env.total_steps", "-1", "--env.steps_per_eval", "1")
        to_process = ("--env.total_steps", str(GROUPS_TO_PROCESS), "--env.data_path_to_save_groups", "groups.jsonl")
        native = ("--env.rollout_server_url", self.native_url, *serve)
        old = ("--env.rollout_server_url", self.old_url, *serve)
        processes = [
            self._start(style, folder, "native", "serve", native, self.engine_url),
            self._start(style, folder, "old", "serve", old, self.unversioned_engine_url),
            self._start(style, folder, "process", "process", to_process, self.engine_url),
            self._start(style, folder, "evaluate", "evaluate", (), self.engine_url),
        ]
        trainer = threading.Thread(target=self._train_natively, args=(style, life))
        trainer.start()
        try:
            self._train_as_of_old(style, life, processes[1])
        finally:
            trainer.join()
            for process in processes:
                life.statuses[process.name] = process.end(deadline)
                life.logs[process.name] = process.log
        return life

    def _start(
        self, style: Style, folder: Path, name: str, mode: str, flags: tuple[str, ...], engine_url: str
    ) -> Process:
        cwd = folder / name
        cwd.mkdir(parents=True)
        places = {"ENGINE": engine_url, "TOKENIZER": self.tokenizer}
        command = [
            sys.executable, str(FOLDER / f"{style.script}.py"), mode,
            "--env.group_size", "4", "--env.tokenizer_name", self.tokenizer, "--openai.base_url", engine_url,
            "--env.data_dir_to_save_evals", "evals", "--env.max_token_length", "64",
            *flags, *(places.get(flag, flag) for flag in style.flags),
        ]  # fmt: skip
        variables = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
        with (folder / f"{name}.log").open("wb") as log:
            popen = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, env=variables)
        return Process(name, folder, popen)

    def _train_natively(self, style: Style, life: Life) -> None:
        """Lease and acknowledge STEPS batches."""

        async def train() -> None:
            request = RunRequest(
                run_name=style.script,
                batch_size=style.batch_size,
                num_steps=STEPS,
                checkpoint_dir=str(life.folder / "checkpoints"),
                save_checkpoint_interval=1,
                wandb_project=style.wandb_project,
            )
            async with RolloutClient(self.native_url) as client:
                run = await client.open_run(request)
                await client.publish_policy(0, session=run.session)
                for step in range(STEPS):
                    life.groups += await client.lease(step, session=run.session, deadline_s=DEADLINE_S)
                    await client.ack(step, session=run.session, policy_version=None)

        asyncio.run(train())

    def _train_as_of_old(self, style: Style, life: Life, env: Process) -> None:
        """POST /register once, then GET /batch again and again, until the environment ends: nothing else."""
        registration = {
            "wandb_group": "", "wandb_project": style.wandb_project or "", "batch_size": style.batch_size,
            "max_token_len": 512, "checkpoint_dir": str(life.folder / "old-checkpoints"),
            "save_checkpoint_interval": 1, "starting_step": 0, "num_steps": STEPS,
        }  # fmt: skip
        with httpx.Client(base_url=self.old_url, timeout=10) as http:
            assert "uuid" in http.post("/register", json=registration).json()
            end = time.monotonic() + DEADLINE_S
            while env.popen.poll() is None and time.monotonic() < end:
                batch = http.get("/batch").json()["batch"]
                if batch is None:
                    time.sleep(0.05)
                    continue
                life.old_groups += batch
                life.old_batch_sizes.append(sum(len(group["tokens"]) for group in batch))


@dataclass(frozen=True)
class Row:
    """One sequence, whatever it travelled in."""

    tokens: list[int]
    masks: list[int]
    score: float
    logprobs: list[float] | None

    @property
    def trained(self) -> list[int]:
        """The ids that are trained."""
        return [token for token, mask in zip(self.tokens, self.masks, strict=True) if mask != MASKED]

    @property
    def prompt(self) -> list[int]:
        """The ids before the first that is trained."""
        first = next((i for i, mask in enumerate(self.masks) if mask != MASKED), len(self.masks))
        return self.tokens[:first]


def rows_of_json(group: Mapping[str, Any]) -> list[Row]:
    """The sequences of a group out of a batch or a groups file."""
    logprobs = group.get("inference_logprobs") or [None] * len(group["tokens"])
    columns = (group["tokens"], group["masks"], group["scores"], logprobs)
    return [Row(*columns) for columns in zip(*columns, strict=True)]


def rows_of_columns(group: Group) -> list[Row]:
    """The sequences of a leased group."""
    rows = []
    for i in range(group.n_sequences):
        part = slice(int(group.cu_seqlens[i]), int(group.cu_seqlens[i + 1]))
        tokens, is_trained = group.tokens[part].tolist(), group.loss_mask[part].tolist()
        masks = [token if trained else MASKED for token, trained in zip(tokens, is_trained, strict=True)]
        logprobs = None if group.inference_logprobs is None else group.inference_logprobs[part].tolist()
        rows.append(Row(tokens, masks, float(group.scores[i]), logprobs))
    return rows
