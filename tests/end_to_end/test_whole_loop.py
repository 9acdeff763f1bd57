"""The whole loop, all of it real: vLLM, SmolLM2-135M, rollout server, environment, trainer, and SIGKILLs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.end_to_end.conftest import MODEL, skip_without_vllm

ROOT = Path(__file__).parents[2]
STEPS = 5
BATCH = 16
DEADLINE_S = 480


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run of `atropos up`, under way; nothing of it is left behind."""
    skip_without_vllm()
    command = [
        sys.executable, "-m", "atroposlib.cli.main", "up", "--config", "configs/demo.yaml", "--plain",
        "name=loop", f"runs_dir={tmp_path}", f"trainer.max_steps={STEPS}", f"trainer.batch_size={BATCH}",
        "trainer.save_steps=2", "environments.0.options.eval_size=16",
    ]  # fmt: skip
    with (tmp_path / "up.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    up = psutil.Process(process.pid)
    family: list[psutil.Process] = []
    try:
        yield tmp_path / "loop"
        family = up.children(recursive=True)
        assert process.wait(timeout=DEADLINE_S) == 0, (tmp_path / "up.log").read_text()[-3000:]
    finally:
        family += up.children(recursive=True) if up.is_running() else []
        for member in [up, *family]:
            if member.is_running():
                member.kill()
        process.wait()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def wait_for_step(run_dir: Path, step: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while not any(line["step"] >= step for line in lines(run_dir / "metrics.jsonl")):
        assert time.monotonic() < end, f"step {step} never came: {lines(run_dir / 'events.jsonl')[-5:]}"
        assert not (run_dir / "summary.json").exists(), "the run ended early"
        time.sleep(0.1)


def kill(run_dir: Path, process: str) -> None:
    pids = [e["pid"] for e in lines(run_dir / "events.jsonl") if e["event"] == "started" and e["process"] == process]
    os.kill(pids[-1], signal.SIGKILL)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_the_loop_survives_sigkill_of_each_process_and_trains_every_group_once(run_dir: Path) -> None:
    wait_for_step(run_dir, 0)
    kill(run_dir, "env-chain_sum")
    wait_for_step(run_dir, 2)
    kill(run_dir, "trainer")
    wait_for_step(run_dir, 3)
    kill(run_dir, "rollout-server")
    end = time.monotonic() + DEADLINE_S
    while not (run_dir / "report.html").exists():  # the last thing that a run writes
        assert time.monotonic() < end, lines(run_dir / "events.jsonl")[-5:]
        time.sleep(0.5)
    summary = json.loads((run_dir / "summary.json").read_text())

    # Counted here from the ledgers, without the code that writes summary.json.
    used = {line["step"]: line["groups"] for line in lines(run_dir / "ledger" / "trainer.jsonl")}
    trained = [group for groups in used.values() for group in groups]
    accepted = {line["group_id"] for line in lines(run_dir / "ledger" / "env-chain_sum.jsonl")}
    at_server = {r["group_id"]: r for r in json.loads((run_dir / "ledger" / "server.json").read_text())}
    assert sorted(used) == list(range(STEPS))
    assert len(trained) == len(set(trained)) == STEPS * BATCH // 8
    assert {group for group, r in at_server.items() if r["state"] == "batched"} == set(trained)
    assert all(at_server[group]["state"] != "retired" for group in accepted - set(trained))
    assert (summary["sequences_lost"], summary["sequences_repeated"]) == (0, 0)
    assert summary["sequences_trained"] == STEPS * BATCH

    assert all(summary["restarts"][name] >= 1 for name in ("env-chain_sum", "trainer", "rollout-server"))
    assert summary["max_staleness_seen"] <= summary["max_staleness_allowed"]
    assert 0 <= summary["heldout_reward_before"] <= 1
    assert 0 <= summary["heldout_reward_after"] <= 1
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (MODEL, run_dir / "final"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
