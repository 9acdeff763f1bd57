"""The semaphore of which only a share may be used."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.server_handling.engines.adaptive_semaphore import AsyncSemWithAdaptiveWeight


async def usable(sem: AsyncSemWithAdaptiveWeight) -> int:
    """Take all that can be had."""
    taken = 0
    while not sem.locked():
        await sem.acquire()
        taken += 1
    return taken


@given(value=st.integers(1, 100), percent=st.integers(1, 100))
def test_the_share_is_rounded_up(value: int, percent: int) -> None:
    sem = AsyncSemWithAdaptiveWeight(value)
    sem.update_weight(percent / 100)

    assert asyncio.run(usable(sem)) == math.ceil(value * percent / 100 - 1e-9)


@pytest.mark.parametrize(("weight", "slots"), [(0.0, 1), (-1.0, 1), (1.0, 8), (2.0, 8), (0.01, 1), (0.5, 4)])
async def test_there_is_always_a_slot_and_never_more_than_all(weight: float, slots: int) -> None:
    sem = AsyncSemWithAdaptiveWeight(8)
    sem.update_weight(weight)

    assert await usable(sem) == slots


async def test_who_waits_gets_the_slot_that_comes_back_in_the_order_of_arrival() -> None:
    sem, order = AsyncSemWithAdaptiveWeight(1), []

    async def work(name: str) -> None:
        async with sem:
            order.append(name)

    await sem.acquire()
    async with asyncio.TaskGroup() as tasks:
        for name in "abc":
            tasks.create_task(work(name))
        await asyncio.sleep(0)
        assert order == []
        sem.release()
    assert order == ["a", "b", "c"]
    assert sem._value == 1


async def test_a_higher_weight_wakes_who_waits_and_a_lower_one_takes_nothing_away() -> None:
    sem = AsyncSemWithAdaptiveWeight(4)
    sem.update_weight(0.5)
    waiting = [asyncio.create_task(sem.acquire()) for _ in range(4)]
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, True, False, False]

    sem.update_weight(1.0)
    await asyncio.gather(*waiting)
    sem.update_weight(0.5)

    sem.release()
    sem.release()
    assert sem.locked(), "two of four are held, which is all that half allows"
    sem.release()
    assert not sem.locked()


@given(plan=st.lists(st.sampled_from(["acquire", "cancel", "release", "weight", "run"]), max_size=40))
def test_slots_are_neither_lost_nor_made_whatever_is_cancelled(plan: list[str]) -> None:
    async def play() -> None:
        sem = AsyncSemWithAdaptiveWeight(3)
        tasks: list[asyncio.Task[bool]] = []
        released = 0
        for action in plan:
            if action == "acquire":
                tasks.append(asyncio.create_task(sem.acquire()))
            elif action == "cancel" and tasks:
                tasks[len(tasks) // 2].cancel()
            elif action == "weight":
                sem.update_weight(0.4 if sem.weight == 1.0 else 1.0)
            elif action == "release" and sum(held(task) for task in tasks) > released:
                sem.release()
                released += 1
            elif action == "run":
                await asyncio.sleep(0)
        sem.update_weight(1.0)
        for _ in range(4):
            await asyncio.sleep(0)
        holders = sum(held(task) for task in tasks) - released
        assert sem._value == 3 - holders
        waiting = [task for task in tasks if not task.done()]
        assert not waiting or holders == 3, "nobody waits while there is a slot"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def held(task: asyncio.Task[bool]) -> bool:
        return task.done() and not task.cancelled()

    asyncio.run(play())


def test_no_slots_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least 1 slot"):
        AsyncSemWithAdaptiveWeight(0)
