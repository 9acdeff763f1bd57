"""The newest payloads in memory: bounded, the oldest out first, and nothing that was dropped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.stores.payloads import Place
from rollout_server.stores.recent_payloads import RecentPayloads


@given(sizes=st.lists(st.integers(1, 50), max_size=30), limit=st.integers(0, 200), dropped=st.sets(st.integers(0, 29)))
def test_the_newest_stay_within_the_limit(sizes: list[int], limit: int, dropped: set[int]) -> None:
    recent = RecentPayloads(limit)
    places = [Place(1, sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    for place in places:
        recent.add([(place, bytes(place.size))])
    held = [recent.get(place) is not None for place in places]

    assert sum(place.size for place, is_held in zip(places, held, strict=True) if is_held) <= limit
    assert held == sorted(held)  # none is older than one that went
    if places and not held[0]:
        oldest_held = held.index(True) if True in held else len(held)
        assert sum(sizes[oldest_held - 1 :]) > limit  # and none went without need

    recent.drop(places[index] for index in dropped if index < len(places))
    for index, place in enumerate(places):
        assert (recent.get(place) is not None) == (held[index] and index not in dropped)


def test_a_view_counts_with_the_whole_buffer_behind_it() -> None:
    recent = RecentPayloads(500)
    small = Place(1, 0, 10)

    recent.add([(small, memoryview(bytes(1000))[:10])])

    assert recent.get(small) is None


def test_views_of_one_buffer_count_once_until_the_last_is_dropped() -> None:
    recent = RecentPayloads(150)
    body = memoryview(bytes(100))
    places = [Place(1, offset, 50) for offset in (0, 50, 100)]

    recent.add([(places[0], body[:50]), (places[1], body[50:]), (places[2], bytes(50))])
    assert None not in [recent.get(place) for place in places]

    recent.drop(places[:1])
    recent.add([(Place(1, 150, 1), b"x")])  # the buffer is still there: its last view has to go
    assert [recent.get(place) is not None for place in places] == [False, False, True]

    recent.add([(Place(1, 151, 99), bytes(99))])
    assert recent.get(places[2]) is not None
