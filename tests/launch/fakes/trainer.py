"""FAKE trainer: leases, acknowledges, checkpoints and resumes like the real one, and learns nothing.

FAKE_DIE_AT_STEP=N: kills itself, once, after the acknowledgement of step N.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from atroposlib.client import RolloutClient
from atroposlib.wire.models import RunRequest

STEPS_PER_CHECKPOINT = 2


def append(path: Path, line: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def steps_done(checkpoints: Path) -> int:
    return max((int(path.name.removeprefix("checkpoint-")) for path in checkpoints.glob("checkpoint-*")), default=0)


async def train(config: dict[str, object], checkpoints: Path) -> None:
    run_dir, steps = Path(str(config["run_dir"])), int(str(config["max_steps"]))
    first = steps_done(checkpoints)
    async with RolloutClient(str(config["rollout_server_url"])) as client:
        run = await client.open_run(
            RunRequest(
                run_name=str(config["run_name"]),
                batch_size=int(str(config["batch_size"])),
                max_staleness=int(str(config["max_staleness"])),
                num_steps=steps,
            )
        )
        await client.publish_policy(max(first, run.policy_version), session=run.session)
        for step in range(first, steps):
            begin = time.time()
            groups = await client.lease(step, session=run.session, deadline_s=30.0)
            rewards = [float(score) for group in groups for score in group.scores]
            ids, stale = (
                [group.group_id for group in groups],
                step - min(g.version_range[0] for g in groups if g.version_range),
            )
            line: dict[str, object] = {"step": step, "groups": ids, "sequences": len(rewards), "max_staleness": stale}
            append(run_dir / "ledger" / "trainer.jsonl", line)
            await client.ack(step, session=run.session, policy_version=max(step + 1, run.policy_version))
            metrics: dict[str, object] = {
                "step": step, "time": time.time(), "policy_version": step + 1, "reward/mean": sum(rewards) / len(rewards),
                "staleness/mean": float(stale), "staleness/max": stale, "mismatch/kl_k3": 0.001, "completion/mean": 2.0,
                "tokens/step": 2 * len(rewards), "time/wait_s": 0.0, "time/train_s": time.time() - begin,
                "time/sync_s": 0.01, "time/step_s": time.time() - begin, "n_sequences": len(rewards),
            }  # fmt: skip
            append(run_dir / "metrics.jsonl", metrics)
            append(
                run_dir / "rollouts.jsonl",
                {"step": step, "version": step, "prompt": "1 + 1 =", "completion": " 2", "reward": 1.0},
            )
            mark = run_dir / "fake-has-died"
            if str(step) == os.environ.get("FAKE_DIE_AT_STEP") and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if (step + 1) % STEPS_PER_CHECKPOINT == 0:
                (checkpoints / f"checkpoint-{step + 1}").mkdir(parents=True)
                await client.commit(step + 1, session=run.session)
        final = run_dir / "final"
        final.mkdir()
        (final / "config.json").write_text("{}")
        (final / "model.safetensors").write_bytes(b"")
        await client.commit(steps, session=run.session)


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        config = yaml.safe_load(file)
    if "no_such_trainer_key" in config:
        print("error: unknown key no_such_trainer_key", file=sys.stderr)
        sys.exit(2)
    if "--dry-run" not in sys.argv:
        asyncio.run(train(config, Path(config["output_dir"])))
