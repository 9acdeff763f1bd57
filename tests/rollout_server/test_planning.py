"""Whether a batch may leave: composition under the staleness bound, with groups in flight."""

from __future__ import annotations

from rollout_server.admission import Bound
from rollout_server.batching import QueuedGroup, Wait
from rollout_server.planning import Plan, Scene, plan_next


def a_scene(*, queued: list[int], in_flight: dict[int, int], is_patient: bool, step: int = 3) -> Scene[QueuedGroup]:
    """Batches of 4 sequences that may be one version old; groups of 2, by their versions."""
    window = [QueuedGroup(key, 0, 2, 10, version, version) for key, version in enumerate(sorted(queued))]
    here = {version: 2 * queued.count(version) for version in set(queued)}
    versions = {*here, *in_flight}
    return Scene(
        bound=Bound(batch_size=4, max_staleness=1, next_step=step),
        queued=here,
        pending={version: here.get(version, 0) + 2 * in_flight.get(version, 0) for version in versions},
        flight=in_flight,
        window=window,
        shares={},
        is_patient=is_patient,
    )


def test_a_batch_leaves_when_what_stays_behind_can_still_be_trained() -> None:
    plan = plan_next(a_scene(queued=[2, 3, 3], in_flight={3: 1}, is_patient=True))

    assert isinstance(plan, Plan)
    assert [group.key for group in plan.groups] == [0, 1]
    assert (plan.overfull, plan.strands) == (None, False)


def test_a_patient_batch_waits_for_a_straggler_at_the_bound_and_counts_it() -> None:
    plan = plan_next(a_scene(queued=[3, 3], in_flight={2: 1}, is_patient=True))

    assert isinstance(plan, Wait)
    assert plan.waiting_for.startswith("1 older groups in flight that step 3 must leave room for")


def test_an_impatient_batch_leaves_and_says_that_it_strands_somebody() -> None:
    plan = plan_next(a_scene(queued=[3, 3], in_flight={2: 1}, is_patient=False))

    assert isinstance(plan, Plan)
    assert (plan.overfull, plan.strands) == (2, True)


def test_too_much_in_the_queue_alone_strands_nobody_in_flight() -> None:
    plan = plan_next(a_scene(queued=[2, 2, 2], in_flight={3: 1}, is_patient=True))

    assert isinstance(plan, Plan)
    assert (plan.overfull, plan.strands) == (2, False)
