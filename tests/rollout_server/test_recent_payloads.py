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
