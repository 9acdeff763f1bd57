"""How close RIM's wall time comes to the critical path of its judge calls.

The judges are SCRIPTED: a mock server on another thread waits for a drawn time and answers a fixed verdict, so nothing
here says how good or how fast a real judge is. The critical path is a bound that no schedule of the calls can beat, even
one that knows every time beforehand: the sum of the scripted times over the workers, or the slowest chain (the slowest
small call of one judge on one trajectory, then its large call), whichever is longer. The replay is what the same calls
take without any overhead by a schedule that knows which judgements will escalate, and begins with them, but no times.
Figures are medians over the rounds.
CPU ms/call is that of the whole process: the mock server's thread is in it.

python -m benchmarks.rim
python -m benchmarks.rim --trajectories 1 4 32 --workers 8 --latency 0.2 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atroposlib.rim import RIMConfig, RIMReward, Trajectory
from atroposlib.testing.mock_inference import MockInferenceServer, Prompt, PromptFunction, in_thread
from benchmarks.rim_schedule import CallTimes, drawn_s, is_doubted


@dataclass(frozen=True)
class Round:
    """One group scored once."""

    wall_s: float
    critical_s: float
    replay_s: float
    cpu_s: float
    metrics: dict[str, float]


class TimedJudge(MockInferenceServer):
    """Draws the time of every call and writes it down."""

    def __init__(self, latency_s: float, seed: int) -> None:
        super().__init__(PromptFunction(self._verdict), keeps_requests=False)
        self._base_s = latency_s
        self._seed = seed
        self.times = CallTimes()

    async def generate(self, body: dict[str, Any], asked: Sequence[Any]) -> Any:
        """Wait, then answer."""
        is_large = body["model"] == "large"
        case = _case(body["messages"][0]["content"])
        seconds = drawn_s(case, body["temperature"], is_large=is_large, seed=self._seed, median_s=self._base_s)
        (self.times.large if is_large else self.times.small)[case].append(seconds)
        await asyncio.sleep(seconds)
        return await super().generate(body, asked)

    def forget(self) -> None:
        """Drop the calls so far."""
        self.times = CallTimes()

    def _verdict(self, prompt: Prompt) -> str:
        text = prompt.last_user_text
        is_doubtful = "<assessments>" not in text and is_doubted(_case(text), self._seed)
        return json.dumps(
            {
                "principles": [{"name": "sound", "weight": 1.0, "description": "every step follows"}],
                "score": 0.7,
                "rationale": "Every step follows from the one before.",
                "uncertainty": 0.5 if is_doubtful else 0.1,
            }
        )


def _case(prompt: str) -> str:
    """Names judge and trajectory."""
    number = prompt.partition("case number ")[2].partition(".")[0]
    judge = next(name for name in ("helped a student", "how a student worked") if name in prompt)
    return f"{judge}/{number}"


def measure(trajectories: int, *, workers: int, latency_s: float, seed: int) -> Round:
    group = [
        Trajectory(
            question=f"This is case number {i}. What is {i} + {seed}?",
            student_answer=str(i + seed),
            ground_truth=str(i + seed),
            student_plan="Add them.",
            teacher_trace="Add the ones first, then the tens. What do you carry?",
            student_trace=f"Ones, then tens: {i + seed}.",
        )
        for i in range(trajectories)
    ]
    judge = TimedJudge(latency_s, seed)
    with in_thread(judge):
        config = RIMConfig.read(
            {
                "preset": "offline",
                "models": {"small_model": f"{judge.url}#small", "large_model": f"{judge.url}#large"},
                "parallel_execution": {"max_workers": workers},
                "max_concurrent_judge_calls": max(32, workers),
            }
        )
        wall_s, cpu_s, metrics = asyncio.run(_score(config, group, judge))
    return Round(wall_s, judge.times.critical_path_s(workers), judge.times.replay_s(workers), cpu_s, metrics)


async def _score(
    config: RIMConfig, group: list[Trajectory], judge: TimedJudge
) -> tuple[float, float, dict[str, float]]:
    async with RIMReward(config) as reward:
        # As an environment does at its start; it also loads the HTTP library.
        await reward.self_test()
        reward.take_metrics()
        judge.forget()
        started, cpu = time.perf_counter(), time.process_time()
        results = await reward.score(group)
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        failed = [result.reasons for result in results if result.score is None]
        if failed:
            raise SystemExit(f"a judge failed: {failed[0]}")
        return wall_s, cpu_s, reward.take_metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, nargs="+", default=[1, 8, 32], help="in one call of score")
    parser.add_argument("--workers", type=int, default=8, help="parallel_execution.max_workers")
    parser.add_argument("--latency", type=float, default=0.2, help="median seconds of a call of the small model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}; {options.workers} workers, {options.latency} s a call, SCRIPTED judges")
    print(
        "trajectories  wall s  critical path s  / critical path  / replay  calls  escalation rate  failed rate  "
        "latency p95 s  CPU ms/call"
    )
    for trajectories in options.trajectories:
        rounds = [
            measure(trajectories, workers=options.workers, latency_s=options.latency, seed=seed)
            for seed in range(options.rounds)
        ]
        print(row(trajectories, rounds))


def row(trajectories: int, rounds: list[Round]) -> str:
    def median(values: Any) -> float:
        return float(statistics.median(values))

    calls = median(one.metrics["rim/calls"] for one in rounds)
    return (
        f"{trajectories:12d}  {median(one.wall_s for one in rounds):6.2f}  {median(one.critical_s for one in rounds):15.2f}"
        f"  {median(one.wall_s / one.critical_s for one in rounds):15.2f}"
        f"  {median(one.wall_s / one.replay_s for one in rounds):8.2f}  {calls:5.0f}"
        f"  {median(one.metrics['rim/escalation_rate'] for one in rounds):15.3f}"
        f"  {median(one.metrics['rim/failed_rate'] for one in rounds):11.3f}"
        f"  {median(one.metrics['rim/latency_p95'] for one in rounds):13.2f}"
        f"  {median(one.cpu_s for one in rounds) / calls * 1e3:11.2f}"
    )


if __name__ == "__main__":
    main()
