"""Coroutines on threads of their own: how they end, and what is told of it."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from atroposlib.errors import AtroposError
from trainer.local.background import Background

DEADLINE_S = 10.0


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


def test_stop_ends_it_without_a_failure() -> None:
    background = Background("test", forever)
    background.start()

    assert background.stop(DEADLINE_S)
    assert background.failure is None


def test_what_was_never_started_has_ended() -> None:
    assert Background("test", forever).stop(DEADLINE_S)


async def error_in_a_group() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(10.0))
        raise KeyError("inside")


async def leaves() -> None:
    sys.exit(3)


@pytest.mark.parametrize(
    ("work", "kind", "told"),
    [(error_in_a_group, KeyError, "inside"), (leaves, AtroposError, r"test was ended by sys\.exit\(3\)")],
)
def test_what_ends_it_is_told(work: object, kind: type[Exception], told: str) -> None:
    seen: list[Exception] = []
    background = Background("test", work, on_failure=seen.append)  # type: ignore[arg-type]
    background.start()

    assert background.join(DEADLINE_S)
    assert seen == [background.failure]
    with pytest.raises(kind, match=told):
        raise seen[0]


def test_a_loop_that_cannot_be_made_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_files_left() -> asyncio.AbstractEventLoop:
        raise OSError("too many open files")

    monkeypatch.setattr("asyncio.events.new_event_loop", no_files_left)
    background = Background("test", forever)
    starter = threading.Thread(target=background.start, daemon=True)
    starter.start()
    starter.join(DEADLINE_S)

    assert not starter.is_alive()
    assert background.stop(DEADLINE_S)
    assert isinstance(background.failure, OSError)
