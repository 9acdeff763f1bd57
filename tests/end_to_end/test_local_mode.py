"""Local mode with a real vLLM and a real model: it trains, and leaves no process behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.conftest import MODEL, skip_without_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240

SCRIPT = textwrap.dedent(
    """
    import signal, sys
    from trainer import GRPOConfig, GRPOTrainer

    # A job that a script started in the background ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model, run_dir, max_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rows = [{"prompt": [{"role": "user", "content": f"{a} + {a} ="}], "answer": 2 * a} for a in range(1, 40)]
    seen = []

    def right(completions, answer, **columns):
        seen.append(len(completions))
        return [float(str(number) in c[0]["content"]) for c, number in zip(completions, answer)]

    args = GRPOConfig(
        run_dir=run_dir, max_steps=max_steps, batch_size=16, num_generations=4,
        max_completion_length=16, learning_rate=1e-5, warmup_steps=0, overlong="keep", bf16=True, save_strategy="no",
    )
    trainer = GRPOTrainer(
        model, args=args, reward_funcs=right, train_dataset=rows, eval_dataset=rows[:8],
        local={"max_prompt_tokens": 64, "inference": {"max_num_seqs": 32}},
    )
    trainer.train()
    assert seen[-1] in (1, 4), seen
    print("evaluated", sorted(trainer.local.evaluations))
    """
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def pids_of(run_dir: Path) -> list[int]:
    return [event["pid"] for event in lines(run_dir / "events.jsonl") if event["event"] == "started"]


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(run_dir: Path, name: str, n: int, user: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + DEADLINE_S
    while len(lines(run_dir / name)) < n:
        assert time.monotonic() < end, f"{name} has no {n} lines"
        assert user.poll() is None, "the script ended early"
        time.sleep(0.1)


@contextmanager
def user_process(tmp_path: Path, *, max_steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """A user's script. Whatever it leaves is killed, after it was counted."""
    skip_without_vllm()
    command = [sys.executable, "-c", SCRIPT, str(MODEL), str(tmp_path / "run"), str(max_steps)]
    with (tmp_path / "said.log").open("wb") as log:
        user = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        yield user
    finally:
        user.kill()
        user.wait()
        for pid in pids_of(tmp_path / "run"):
            if is_alive(pid):
                psutil.Process(pid).kill()


def test_three_steps_with_real_weights_in_a_real_engine(tmp_path: Path) -> None:
    with user_process(tmp_path, max_steps=3) as user:
        status = user.wait(timeout=DEADLINE_S)
        said = (tmp_path / "said.log").read_text()
        left = [pid for pid in pids_of(tmp_path / "run") if is_alive(pid)]

    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert status == 0, said[-3000:]
    assert "evaluated ['after', 'before']" in said
    assert [step["policy_version"] for step in steps] == [1, 2, 3]
    assert all(0.0 <= step["reward/mean"] <= 1.0 for step in steps)
    # The engine samples what the trainer computes: bfloat16 on both sides.
    assert all(step["mismatch/kl_k3"] < 0.05 for step in steps)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert len(pids_of(tmp_path / "run")) == 2
    assert left == []


@pytest.mark.parametrize("moment", ["events.jsonl", "metrics.jsonl"], ids=["starting", "training"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, moment: str) -> None:
    with user_process(tmp_path, max_steps=500) as user:
        # Two events: both services are started, and none is ready.
        wait_for(tmp_path / "run", moment, 2, user)
        user.send_signal(signal.SIGINT)
        status = user.wait(timeout=DEADLINE_S)
        left = [pid for pid in pids_of(tmp_path / "run") if is_alive(pid)]

    assert status != 0
    assert "KeyboardInterrupt" in (tmp_path / "said.log").read_text()
    assert left == []
