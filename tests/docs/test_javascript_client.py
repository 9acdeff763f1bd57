"""The reference client in JavaScript against a real server: what it sends is what the others get."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from atroposlib.client import RolloutClient
from tests.processes import RolloutServerProcess

EXAMPLE = Path(__file__).parents[2] / "docs" / "clients" / "javascript" / "example.mjs"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


async def test_a_group_from_javascript_survives_byte_for_byte(rollout_server: RolloutServerProcess) -> None:
    assert NODE is not None

    process = await asyncio.create_subprocess_exec(
        NODE, str(EXAMPLE), rollout_server.url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        output, problems = await process.communicate()

    assert process.returncode == 0, problems.decode()
    told = json.loads(output)
    async with RolloutClient(rollout_server.url, deadline_s=5) as client:
        (group,) = await client.lease(0, session=told["session"], deadline_s=5)
    assert (told["status"], told["repeated"], told["same_bytes"], told["step"]) == ("accepted", "duplicate", True, 1)
    assert group.tokens.tolist() == told["tokens"] == [1, 2, 3, 70000, 1, 2, 4]
    assert group.scores.tolist() == told["scores"] == [1.0, 0.1]
    assert group.cu_seqlens.tolist() == [0, 4, 7]
    assert group.version_range == (0, 0)
    assert group.messages == told["facts"]["messages"] == [[{"role": "user", "content": "¿Qué? 你好 🙂"}]]
    assert group.finish_reasons == ("stop", "length")
