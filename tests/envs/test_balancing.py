"""Which server gets the next request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.server_handling.pool.balancing import (
    SPARE_BELOW,
    Occupancy,
    home_of_session,
    least_busy,
    may_leave_home,
    usable_slots,
)

occupancies = st.builds(
    Occupancy,
    in_flight=st.integers(0, 9),
    slots=st.integers(0, 8),
    reserved=st.integers(0, 9),
    others_in_flight=st.integers(0, 3),
    is_suspect=st.booleans(),
)


@given(limit=st.integers(1, 1000), weight=st.floats(0, 1))
def test_a_weight_leaves_at_least_one_slot_and_never_more_than_the_limit(limit: int, weight: float) -> None:
    assert 1 <= usable_slots(limit, weight) <= limit


def test_slots_are_rounded_up_as_upstream_does() -> None:
    assert [usable_slots(8, weight) for weight in (1.0, 0.5, 0.3, 0.01)] == [8, 4, 3, 1]
    assert usable_slots(100, 0.07) == 7


@given(servers=st.lists(occupancies, max_size=5))
def test_a_full_server_gets_nothing_and_a_free_one_is_found_if_there_is_one(servers: list[Occupancy]) -> None:
    chosen = least_busy(servers)

    assert (chosen is None) == all(server.is_full for server in servers)
    assert chosen is None or not servers[chosen].is_full


@given(servers=st.lists(occupancies, max_size=5))
def test_a_session_settles_wherever_requests_are_taken(servers: list[Occupancy]) -> None:
    home = home_of_session(servers)

    assert (home is None) == all(server.slots == 0 for server in servers)
    assert home is None or servers[home].slots > 0


def test_the_share_of_slots_in_use_decides_not_the_number() -> None:
    assert least_busy([Occupancy(3, 4), Occupancy(10, 100)]) == 1


def test_open_sessions_count_before_their_requests_do() -> None:
    assert home_of_session([Occupancy(0, 8, reserved=3), Occupancy(1, 8)]) == 1


def test_between_equals_the_other_split_decides_and_the_first_wins() -> None:
    assert least_busy([Occupancy(1, 8, others_in_flight=2), Occupancy(1, 8)]) == 1
    assert least_busy([Occupancy(1, 8), Occupancy(1, 8)]) == 0


def test_a_server_said_to_be_unwell_is_taken_last() -> None:
    assert least_busy([Occupancy(0, 8, is_suspect=True), Occupancy(7, 8)]) == 1
    assert least_busy([Occupancy(0, 8, is_suspect=True), Occupancy(8, 8)]) == 0


@given(home=occupancies, others=st.lists(occupancies, max_size=4))
def test_a_session_leaves_a_full_home_only_for_room_to_spare(home: Occupancy, others: list[Occupancy]) -> None:
    chosen = may_leave_home(home, others)

    if chosen is not None:
        assert home.is_full
        assert others[chosen].filled < (1.0 if home.slots == 0 else SPARE_BELOW)


def test_a_home_that_takes_nothing_is_left_for_any_free_slot() -> None:
    assert may_leave_home(Occupancy(3, 0), [Occupancy(7, 8)]) == 0
    assert may_leave_home(Occupancy(8, 8), [Occupancy(7, 8)]) is None
