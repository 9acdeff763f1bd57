"""How many requests one engine gets at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.server_handling.engines.engine_load import EngineLoad
from atroposlib.envs.server_handling.pool.adaptive_concurrency import Concurrency, adapt

CEILING = 512
loads = st.builds(EngineLoad, running=st.integers(0, 600), waiting=st.integers(0, 600), kv_cache_usage=st.floats(0, 1))


def a_look(waiting: int = 0, cache: float = 0.5) -> EngineLoad:
    return EngineLoad(running=10, waiting=waiting, kv_cache_usage=cache)


@given(loads=st.lists(loads, max_size=40), limit=st.integers(1, CEILING), in_flight=st.integers(0, CEILING))
def test_the_limit_stays_between_one_and_the_ceiling(loads: list[EngineLoad], limit: int, in_flight: int) -> None:
    state = Concurrency(limit)
    for load in loads:
        state = adapt(state, load, in_flight=in_flight, ceiling=CEILING)
        assert 1 <= state.limit <= CEILING


@given(load=loads, limit=st.integers(1, CEILING), waiting=st.integers(0, 600), in_flight=st.integers(0, CEILING))
def test_it_rises_only_with_room_and_falls_only_with_a_reason(
    load: EngineLoad, limit: int, waiting: int, in_flight: int
) -> None:
    after = adapt(Concurrency(limit, waiting), load, in_flight=in_flight, ceiling=CEILING)

    if after.limit > limit:
        assert load.waiting == 0
        assert load.kv_cache_usage < 0.9
        assert in_flight >= limit
    if after.limit < limit:
        assert load.waiting >= max(1, waiting) or load.kv_cache_usage >= 0.98


def test_it_falls_by_a_share_and_rises_by_a_step() -> None:
    fallen = adapt(Concurrency(500), a_look(waiting=3), in_flight=500, ceiling=CEILING)
    risen = adapt(Concurrency(100), a_look(), in_flight=100, ceiling=CEILING)

    assert (fallen.limit, risen.limit) == (400, 132)


def test_a_queue_that_shrinks_is_given_time() -> None:
    state = adapt(Concurrency(500), a_look(waiting=30), in_flight=500, ceiling=CEILING)
    state = adapt(state, a_look(waiting=10), in_flight=420, ceiling=CEILING)
    assert state.limit == 400

    assert adapt(state, a_look(waiting=10), in_flight=400, ceiling=CEILING).limit == 320


def test_a_full_cache_is_reason_enough_and_a_nearly_full_one_holds() -> None:
    assert adapt(Concurrency(100), a_look(cache=0.99), in_flight=100, ceiling=CEILING).limit == 80
    assert adapt(Concurrency(100), a_look(cache=0.95), in_flight=100, ceiling=CEILING).limit == 100


def test_a_limit_that_nobody_reaches_does_not_rise() -> None:
    assert adapt(Concurrency(100), a_look(), in_flight=20, ceiling=CEILING).limit == 100


@given(capacity=st.integers(4, 400))
def test_against_a_steady_engine_it_settles_near_what_the_engine_can_run(capacity: int) -> None:
    state, seen = Concurrency(CEILING), []
    for _ in range(80):
        load = EngineLoad(min(state.limit, capacity), max(0, state.limit - capacity), 0.5)
        state = adapt(state, load, in_flight=state.limit, ceiling=CEILING)
        seen.append(state.limit)
    step = CEILING // 16

    assert max(seen[-20:]) <= capacity + step
    assert max(seen[-20:]) >= capacity * 0.8 - 1
