"""`python environments/chain_sum.py serve` as a process: it works, and SIGTERM ends it with its tickets returned."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from atroposlib.client import RolloutClient
from atroposlib.testing.byte_tokenizer import byte_tokenizer, save_byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.wire.models import RunRequest
from tests.processes import RolloutServerProcess

ROOT = Path(__file__).parents[2]


async def test_sigterm_ends_it_with_status_0_and_no_ticket_held(
    rollout_server: RolloutServerProcess, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    arguments = {
        "group_size": 2,
        "tokenizer_name": save_byte_tokenizer(tmp_path / "tokenizer"),
        "rollout_server_url": rollout_server.url,
        "run_dir": tmp_path / "run",
        "openai.model_name": "mock",
    }

    # Nobody's answer is right, so nothing is ever sent and tickets come and go.
    async with MockInferenceServer(lambda prompt, index: tokenizer.encode("no"), latency_s=0.2) as engine:
        flags = [
            word
            for name, value in {**arguments, "openai.base_url": engine.url}.items()
            for word in (f"--{name}", str(value))
        ]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "environments/chain_sum.py", "serve", *flags, cwd=ROOT, stderr=asyncio.subprocess.PIPE
        )
        async with RolloutClient(rollout_server.url) as trainer, asyncio.timeout(60):
            run = await trainer.open_run(RunRequest(run_name="r", batch_size=8, max_staleness=1, num_steps=5))
            await trainer.publish_policy(0, session=run.session)
            while not engine.requests:  # noqa: ASYNC110 - the mock has no event to wait for
                await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, stderr = await process.communicate()
            status = await trainer.status()

    assert process.returncode == 0, stderr.decode()
    assert b"Traceback" not in stderr
    assert status.tickets_outstanding == 0
    assert status.tickets_returned["shutdown"] >= 1
    assert (tmp_path / "run" / "env_metrics.jsonl").is_file()
