"""Calls in flight are bounded, and what finishes goes before what begins."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from atroposlib.rim.slots import DOUBTED, FIRST, FURTHER, CallSlots, Line, Place


class Call:
    """Holds a slot until it is told to stop."""

    def __init__(self, slots: Line, name: str, log: list[str], *, is_urgent: bool = False) -> None:
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._hold(slots, name, log, is_urgent))

    async def _hold(self, slots: Line, name: str, log: list[str], is_urgent: bool) -> None:
        async with slots.held(is_urgent=is_urgent):
            log.append(name)
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


async def turns(n: int = 5) -> None:
    """Let every task run as far as it can."""
    for _ in range(n):
        await asyncio.sleep(0)


async def test_urgent_calls_go_first_and_equals_in_order() -> None:
    slots, log = CallSlots(1), list[str]()
    first = Call(slots, "first", log)
    await turns()
    names = ["small 1", "small 2", "large 1", "large 2"]
    calls = [Call(slots, name, log, is_urgent=name.startswith("large")) for name in names]
    for call in (first, calls[2], calls[3], calls[0], calls[1]):
        await turns()
        await call.end()

    assert log == ["first", "large 1", "large 2", "small 1", "small 2"]


async def test_a_new_rank_moves_those_that_wait_already() -> None:
    slots, log = CallSlots(1), list[str]()
    further = Place(slots, FURTHER)
    holder = Call(slots, "holder", log)
    await turns()
    early = [Call(Place(slots, FURTHER), "early", log), Call(further, "doubted", log)]
    first = Call(Place(slots, FIRST), "first", log)
    urgent = Call(further, "urgent", log, is_urgent=True)
    await turns()
    further.rank = DOUBTED
    for call in (holder, urgent, early[1], first, early[0]):
        await call.end()
        await turns()

    assert log == ["holder", "urgent", "doubted", "first", "early"]


async def test_free_slots_go_by_rank_among_calls_that_come_together() -> None:
    slots, log = CallSlots(2), list[str]()
    ranks = {"further": FURTHER, "first": FIRST, "doubted": DOUBTED}
    calls = {name: Call(Place(slots, rank), name, log) for name, rank in ranks.items()}
    await turns()
    started = list(log)
    for name in ("doubted", "first", "further"):
        await calls[name].end()

    assert started == ["doubted", "first"]


async def test_one_that_gave_up_takes_no_slot_with_it() -> None:
    slots, log = CallSlots(1), list[str]()
    first, second, third = (Call(slots, name, log) for name in ("1", "2", "3"))
    await turns()
    second.task.cancel()
    await first.end()
    await third.end()

    assert log == ["1", "3"]


async def test_one_that_gave_up_as_its_turn_came_gives_the_slot_back() -> None:
    slots, log = CallSlots(1), list[str]()
    async with slots.held(is_urgent=False):
        second, third = (Call(slots, name, log) for name in ("2", "3"))
        await turns()
    # The slot is its own by now, but it has not run since.
    second.task.cancel()
    await third.end()

    assert log == ["3"]


CALLS = st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.booleans()), max_size=12)
"""Of each call: whether it is urgent, how many turns it takes, whether it is cancelled."""


@given(size=st.integers(1, 4), calls=CALLS, before_cancelling=st.integers(0, 6))
def test_the_bound_holds_and_every_slot_comes_back(
    size: int, calls: list[tuple[bool, int, bool]], before_cancelling: int
) -> None:
    slots, running, most = CallSlots(size), 0, 0

    async def call(is_urgent: bool, n_turns: int) -> None:
        nonlocal running, most
        async with slots.held(is_urgent=is_urgent):
            running += 1
            most = max(most, running)
            try:
                await turns(n_turns)
            finally:
                running -= 1

    async def play() -> None:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(call(is_urgent, n_turns)) for is_urgent, n_turns, _ in calls]
            await turns(before_cancelling)
            for task, (_, _, is_cancelled) in zip(started, calls, strict=True):
                if is_cancelled:
                    task.cancel()

    asyncio.run(play())

    assert most <= size
    assert slots._free == size
