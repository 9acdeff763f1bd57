"""How long the demo's task takes to a given reward: atropos up with configs/demo.yaml against TRL's GRPOTrainer.

    python -m benchmarks.trainer_end_to_end
    python -m benchmarks.trainer_end_to_end --minutes 1 --only ours

Both train SmolLM2-135M on the same problems in the same order: 64 completions a step in groups of 8, learning rate 2e-5
falling to 0 over 56 steps, weights in float32, passes in bfloat16, one after the other on the same machine. TRL samples
with transformers, as it does without vLLM. The reward is the mean over everything that was sampled: of TRL's over its last
3 steps (192 completions), of ours over the newest 512. Seconds count from the moment that both programs could train
(model loaded, engine started); what came before is reported too, and counted in a second figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from atroposlib.envs.serving.stats import REWARD_WINDOW
from atroposlib.envs.tokenizers import load_tokenizer
from atroposlib.launch.jsonl import read_jsonl
from benchmarks.peers import peer_python
from benchmarks.rollout_server.processes import ROOT
from benchmarks.rollout_server.report import progress, save, table
from benchmarks.trainer.__main__ import ALLOCATOR
from environments.chain_sum import ChainSumConfig, training_problems

DEMO = ROOT / "configs" / "demo.yaml"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
SMOOTHED_STEPS = 3
LEVELS = 0.01
"""Rewards are compared in steps of this."""
TOLERANCE = 1e-6
"""Of rounding."""
SETTLE_S = 5.0

Curve = list[tuple[float, float]]
"""Seconds since the program could train, and the mean reward of what was sampled lately."""


@dataclass(frozen=True)
class Outcome:
    """One program's run."""

    warm_up_s: float
    steps: int
    curve: Curve

    def reached(self, reward: float) -> float | None:
        """Seconds to this reward; None where it was not reached."""
        return next((seconds for seconds, value in self.curve if value >= reward - TOLERANCE), None)

    def at(self, seconds: float) -> float | None:
        """The reward then; None before the first."""
        return next((value for at, value in reversed(self.curve) if at <= seconds), None)


def smoothed(steps: Sequence[tuple[float, float]], width: int = SMOOTHED_STEPS) -> Curve:
    """Means over the last `width` steps, from the first time that there are so many."""
    return [
        (steps[i][0], sum(reward for _, reward in steps[i + 1 - width : i + 1]) / width)
        for i in range(width - 1, len(steps))
    ]


def highest_common(outcomes: Sequence[Outcome]) -> float:
    """The highest reward, in whole LEVELS, that every program reached."""
    best = min(max((value for _, value in outcome.curve), default=0.0) for outcome in outcomes)
    return math.floor(best / LEVELS + TOLERANCE) * LEVELS


# Ours


def run_ours(folder: Path, *, seed: int, limit_s: float, overrides: Sequence[str]) -> Outcome:
    """`atropos up`, ended after limit_s of training."""
    command = [
        sys.executable, "-m", "atroposlib.cli.main", "up", "--config", str(DEMO), "--plain", "name=run",
        f"runs_dir={folder}", f"seed={seed}", "evaluation.before=false", "evaluation.after=false", *overrides,
    ]  # fmt: skip
    started = time.time()
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        began = _wait_for_training(folder / "run", process)
        _wait(process, began + limit_s - time.time())
    finally:
        process.send_signal(signal.SIGINT)
        if not _wait(process, STOP_TIMEOUT_S):
            process.kill()
            process.wait()
    curve = [
        (line["time"] - began, line["env/reward_mean"])
        for line in read_jsonl(folder / "run" / "env_metrics.jsonl")
        # Not before the window is full: the mean of a few is noise.
        if sum(line.get("env/finish_reasons", {}).values()) >= REWARD_WINDOW
    ]
    return Outcome(began - started, len(read_jsonl(folder / "run" / "metrics.jsonl")), curve)


def _wait_for_training(run: Path, process: subprocess.Popen[bytes]) -> float:
    """Unix time at which trainer, engine and environments could begin."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        for event in read_jsonl(run / "events.jsonl") if (run / "events.jsonl").exists() else []:
            if event.get("phase") == "training":
                return float(event["time"])
        time.sleep(0.2)
    raise RuntimeError(f"atropos up did not come to training: {(run.parent / 'up.log').read_text()[-2000:]}")


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout=max(0.0, timeout_s))
    except subprocess.TimeoutExpired:
        return False
    return True


# TRL


def workload(*, seed: int, limit_s: float, micro_batch: int) -> dict[str, Any]:
    """The demo's task for TRL: the same problems in the same order, as text."""
    demo = yaml.safe_load(DEMO.read_text())
    trainer, group_size = demo["trainer"], demo["environments"][0]["group_size"]
    model = str(ROOT / demo["model"])
    tokenizer = load_tokenizer(model)
    config = ChainSumConfig(seed=seed)
    needed = trainer["max_steps"] * trainer["batch_size"] // group_size
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True)
            + problem.prefill,
            "answer": problem.answer,
        }
        for problem in islice(training_problems(config), needed)
    ]
    return {
        "model": model, "rows": rows, "seed": seed, "limit_s": limit_s, "micro_batch": micro_batch,
        "batch_size": trainer["batch_size"], "group_size": group_size, "max_steps": trainer["max_steps"],
        "learning_rate": trainer["learning_rate"], "max_tokens": config.max_tokens,
    }  # fmt: skip


def run_trl(folder: Path, facts: dict[str, Any], *, threads: int) -> Outcome:
    """TRL's trainer, which ends itself after limit_s of training."""
    (folder / "workload.json").write_text(json.dumps(facts))
    command: list[str | Path] = [
        peer_python("trl"), "-P", ROOT / "benchmarks" / "trl_end_to_end.py", folder / "workload.json", folder / "trl",
    ]  # fmt: skip
    silent = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **ALLOCATOR, **silent, "OMP_NUM_THREADS": str(threads)}
    with (folder / "trl.log").open("wb") as log:
        done = subprocess.run(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=log,
            timeout=START_TIMEOUT_S + 2 * facts["limit_s"] + 120, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"TRL failed: {(folder / 'trl.log').read_text()[-2000:]}")
    events = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith('{"event"')]
    warm_up_s = next(event["seconds"] for event in events if event["event"] == "ready")
    steps = [(event["seconds"] - warm_up_s, event["reward"]) for event in events if event["event"] == "step"]
    return Outcome(warm_up_s, len(steps), smoothed(steps))


# Both


def report(outcomes: dict[str, Outcome], target: float | None) -> None:
    """Time to equal reward, and reward at equal time."""
    rows = [[name, one.warm_up_s, one.steps, one.curve[-1][1] if one.curve else None] for name, one in outcomes.items()]
    print(table(["program", "warm-up s", "steps", "last reward"], rows))
    if len(outcomes) < 2:
        return
    ours, trl = outcomes["ours"], outcomes["TRL"]
    level = highest_common([ours, trl]) if target is None else target
    compared = []
    for reward in [level] if target is not None else [level - n * 5 * LEVELS for n in range(3)]:
        a, b = ours.reached(reward), trl.reached(reward)
        if a is not None and b is not None:
            compared.append([reward, a, b, a / b, (a + ours.warm_up_s) / (b + trl.warm_up_s)])
    print(f"\n{table(['reward', 'ours s', 'TRL s', 'ours / TRL', 'with warm-up'], compared)}\n")
    end = min(outcome.curve[-1][0] if outcome.curve else 0.0 for outcome in (ours, trl))
    minutes = [[m, ours.at(60 * m), trl.at(60 * m)] for m in range(1, int(end / 60) + 1)]
    print(table(["minute", "ours", "TRL"], minutes))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer_end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, for each (8)")
    parser.add_argument("--target", type=float, help="the reward to reach (the highest that both reach)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batch", type=int, default=16, help="TRL's sequences of a pass (16)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="TRL's (all cores)")
    parser.add_argument("--only", choices=["ours", "TRL"])
    parser.add_argument("--override", nargs="*", default=[], help="key=value for atropos up")
    args = parser.parse_args()
    limit_s, outcomes = 60 * args.minutes, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only != "TRL":
            progress(f"ours, {args.minutes:g} minutes")
            outcomes["ours"] = run_ours(folder, seed=args.seed, limit_s=limit_s, overrides=args.override)
            time.sleep(SETTLE_S)  # for the machine to settle
        if args.only != "ours":
            progress(f"TRL, {args.minutes:g} minutes")
            facts = workload(seed=args.seed, limit_s=limit_s, micro_batch=args.micro_batch)
            outcomes["TRL"] = run_trl(folder, facts, threads=args.threads)
        report(outcomes, args.target)
        save("trainer-end-to-end", {"outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()}})


if __name__ == "__main__":
    main()
