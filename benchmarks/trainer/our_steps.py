"""Our GRPOTrainer on given completions: python -m benchmarks.trainer.our_steps MODEL WORKLOAD.json OUTPUT_DIR [key=value ...]

Prints one line of JSON: seconds of each step, peak memory in bytes, and how full the micro batches were.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from atroposlib.wire.columns import Group
from atroposlib.wire.models import RunInfo, RunRequest
from trainer.config.compose import load_config
from trainer.grpo_trainer import GRPOTrainer


def now() -> tuple[float, float]:
    """Seconds of the wall clock, and of all threads of this process."""
    return time.perf_counter(), time.process_time()


class GivenBatches:
    """A rollout server in memory: every batch is there, and a step ends when it is acknowledged."""

    def __init__(self, workload: dict[str, Any], steps: list[list[dict[str, Any]]]) -> None:
        self.marks = [now()]
        self._size = workload["group_size"]
        self._steps = steps

    async def open_run(self, request: RunRequest) -> RunInfo:
        return RunInfo(
            run_id="benchmark", run_name=request.run_name, session=1, policy_version=-1, committed_step=0,
            acknowledged_step=0, request=request,
        )  # fmt: skip

    async def lease(self, step: int, *, session: int, deadline_s: float) -> list[Group]:
        rows = self._steps[step]
        groups = [as_group(step, i, rows[i : i + self._size]) for i in range(0, len(rows), self._size)]
        if step == 0:
            self.marks = [now()]
        return groups

    async def ack(self, step: int, *, session: int, policy_version: int | None) -> None:
        self.marks.append(now())

    async def commit(self, step: int, *, session: int) -> None:
        return None

    async def publish_policy(self, policy_version: int, *, session: int) -> None:
        return None

    async def renew_trainer(self, session: int) -> None:
        return None

    async def close(self) -> None:
        return None


def as_group(step: int, number: int, rows: list[dict[str, Any]]) -> Group:
    """The wire's columns of one group."""
    prompts = [len(row["prompt_ids"]) for row in rows]
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    sampled = [np.r_[np.zeros(p), np.ones(n - p)] for p, n in zip(prompts, lengths, strict=True)]
    return Group(
        group_id=f"{step}-{number}",
        env_id=0,
        tokens=np.concatenate([[*row["prompt_ids"], *row["completion_ids"]] for row in rows]).astype(np.int32),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        loss_mask=np.concatenate(sampled).astype(np.uint8),
        inference_logprobs=np.concatenate([[0.0] * len(row["prompt_ids"]) + row["logprobs"] for row in rows]).astype(
            np.float32
        ),
        policy_versions=np.array([[step, sum(lengths)]], dtype=np.int32),
        scores=np.array([row["reward"] for row in rows], dtype=np.float64),
    )


def main() -> None:
    model, workload_file, output_dir, *overrides = sys.argv[1:]
    facts = json.loads(Path(workload_file).read_text())
    workload = facts["workload"]
    batches = GivenBatches(workload, facts["steps"])
    config = load_config(
        None,
        [
            f"model_name_or_path={model}", f"run_dir={output_dir}", f"max_steps={workload['steps']}", "bf16=true",
            f"batch_size={workload['groups'] * workload['group_size']}", "learning_rate=1e-5", "save_strategy='no'",
            "lr_scheduler_type=constant", "warmup_steps=0", "overlong=keep", *overrides,
        ],
    )  # fmt: skip
    GRPOTrainer(config, connect=lambda: batches).train()
    seconds, cpu_seconds = np.diff(np.array(batches.marks), axis=0).T.tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
