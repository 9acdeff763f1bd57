"""What becomes of a group whose delivery fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from atroposlib.envs.serving.courier import Courier
from atroposlib.envs.serving.spool import Spool
from atroposlib.errors import ProtocolError, UnauthenticatedError
from atroposlib.wire.columns import Group, decode_groups
from atroposlib.wire.models import GroupResult
from tests.builders import a_group


class FailingServer:
    """Answers every group with the same error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def post_groups(self, groups: Sequence[Group]) -> list[GroupResult]:
        raise self.error


@asynccontextmanager
async def courier_with(spool: Spool, error: Exception) -> AsyncIterator[Courier]:
    membership: Any = SimpleNamespace(info=SimpleNamespace(env_id=1, run=SimpleNamespace(run_id=None)))
    courier = Courier(FailingServer(error), membership, spool)
    running = asyncio.create_task(courier.run())
    try:
        yield courier
    finally:
        running.cancel()
        courier.close()


async def test_a_group_that_may_not_be_sent_now_is_in_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.groups", max_bytes=1 << 20)

    async with courier_with(spool, UnauthenticatedError("who are you?")) as courier:
        with pytest.raises(UnauthenticatedError):
            await courier.deliver(a_group("a"))

    assert [group.group_id for group in decode_groups(spool.path.read_bytes())] == ["a"]


async def test_a_group_that_the_server_refused_is_not(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s.groups", max_bytes=1 << 20)

    async with courier_with(spool, ProtocolError("no")) as courier:
        with pytest.raises(ProtocolError):
            await courier.deliver(a_group("a"))

    assert not spool.path.exists()


async def test_a_group_that_cannot_be_spooled_fails_with_the_answer_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "s.groups", max_bytes=1 << 20)

    async with courier_with(spool, UnauthenticatedError("who are you?")) as courier:
        with pytest.raises(UnauthenticatedError):
            await courier.deliver(replace(a_group("a"), scores=np.array([0.0, np.nan])))

    assert "group a waits in memory only" in caplog.text


async def test_a_spool_that_cannot_be_opened_is_gone_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with courier_with(Spool(tmp_path, max_bytes=1 << 20), ProtocolError("no")) as courier:
        assert [answer async for answer in courier.deliver_left_over()] == []

    assert "goes on without its spool" in caplog.text
