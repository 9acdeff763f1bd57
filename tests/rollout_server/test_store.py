"""What every store promises. One specification; each store runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from atroposlib.errors import (
    ConfigError,
    FencedError,
    GroupFormatError,
    NoRunError,
    ProtocolError,
    QueueFullError,
    StepError,
    UnknownEnvError,
)
from atroposlib.wire.columns import Blob, Group, decode_groups, encode_group, read_blobs
from atroposlib.wire.models import EnvRequest, InferenceServer, NackRequest, RunRequest, TicketRequest, TicketUpdate
from rollout_server.stores.base import WHOLE, Batch, NotReady, Shard, Store
from tests.builders import a_group, a_run
from tests.rollout_server.conftest import Stores

MANY = 100


def blobs(*groups: Group) -> list[Blob]:
    return list(read_blobs(b"".join(encode_group(group) for group in groups)))


def run_like(**changes: Any) -> RunRequest:
    return a_run().model_copy(update=changes)


async def started(store: Store, **run: Any) -> tuple[int, int]:
    """Open a run at version 0 with one environment; returns trainer session and environment session."""
    info = await store.open_run(run_like(**run))
    env = await store.register_env(EnvRequest(name="env", group_size=2))
    await store.set_policy(0, info.session)
    return info.session, env.session


async def tickets(store: Store, session: int, count: int = 1, *, env_id: int = 0, sequences: int = 2) -> list[str]:
    request = TicketRequest(env_id=env_id, session=session, sequences=sequences, count=count)
    return [ticket.ticket for ticket in (await store.grant_tickets(request)).tickets]


async def post(store: Store, granted: Sequence[str], **group: Any) -> list[str]:
    """Post a group for each ticket; returns their statuses."""
    return [result.status for result in await store.append(blobs(*[a_group(ticket=t, **group) for t in granted]))]


async def held(store: Store, step: int, session: int, shard: Shard = WHOLE) -> list[str]:
    """The group_ids of a step's batch."""
    batch = await store.lease(step, session, shard)
    assert isinstance(batch, Batch), batch
    return [decode_groups(blob)[0].group_id for blob in batch.blobs]


async def places(store: Store) -> dict[str, tuple[str, int | None, str | None]]:
    """State, step and reason of every group."""
    page = await store.records()
    assert page.next is None
    return {record.group_id: (record.state, record.step, record.reason) for record in page.records}


async def counted(store: Store) -> dict[str, Any]:
    """The status without the ages in it."""
    ages = {"last_seen_s": True}
    return (await store.status()).model_dump(
        exclude={"trainer_last_seen_s": True, "envs": {"__all__": ages}, "inference_servers": {"__all__": ages}}
    )


class TestGroups:
    async def test_a_group_reaches_the_trainer_as_the_bytes_that_came_in(self, store: Store) -> None:
        trainer, env = await started(store)
        groups = [a_group(ticket=ticket) for ticket in await tickets(store, env, 2)]

        await store.append(blobs(*groups))
        batch = await store.lease(0, trainer)

        assert isinstance(batch, Batch)
        assert [bytes(blob) for blob in batch.blobs] == [encode_group(group) for group in groups]

    async def test_a_repeated_group_is_a_duplicate_and_counts_once(self, store: Store) -> None:
        trainer, env = await started(store)
        group = a_group("g1", ticket=(await tickets(store, env))[0])

        first, second = await store.append(blobs(group)), await store.append(blobs(group, group))

        assert [result.status for result in first + second] == ["accepted", "duplicate", "duplicate"]
        status = await store.status()
        assert (status.queued_groups, status.groups_accepted, status.groups_duplicate) == (1, 1, 2)
        assert isinstance(await store.lease(0, trainer), NotReady)

    async def test_a_group_twice_in_one_request_counts_once(self, store: Store) -> None:
        await started(store)

        results = await store.append(blobs(a_group("g1"), a_group("g1")))

        assert [result.status for result in results] == ["accepted", "duplicate"]

    async def test_a_group_of_another_run_is_retired(self, store: Store) -> None:
        await started(store)
        run_id = (await store.run_info()).run_id

        results = await store.append(
            blobs(replace(a_group("mine"), run_id=run_id), replace(a_group("foreign"), run_id="another"))
        )

        assert [(result.status, result.reason) for result in results] == [("accepted", None), ("retired", "other_run")]
        assert (await store.status()).groups_retired == {"other_run": 1}

    async def test_which_groups_are_known(self, store: Store) -> None:
        await started(store)
        await store.append(blobs(a_group("g1"), replace(a_group("g2"), run_id="another")))

        assert await store.known(["g1", "g2", "g3"]) == {"g1", "g2"}
        assert await store.known([]) == set()

    async def test_the_latest_group_is_the_one_accepted_last(self, store: Store) -> None:
        assert await store.latest_group() is None
        await started(store)
        last = a_group("g2")

        await store.append(blobs(a_group("g1"), last, replace(a_group("g3"), run_id="another")))

        found = await store.latest_group()
        assert found is not None
        assert bytes(found) == encode_group(last)

    async def test_a_group_over_max_token_len_is_refused_whole(self, store: Store) -> None:
        await started(store, max_token_len=7)

        with pytest.raises(GroupFormatError, match="a sequence of 8 tokens"):
            await store.append(blobs(a_group(), a_group("long", completion=5)))

        assert (await store.status()).queued_groups == 0

    async def test_a_full_queue_refuses_and_stays_up(self, stores: Stores) -> None:
        store = await stores.open(max_queued_bytes=2000)
        await started(store)

        with pytest.raises(QueueFullError, match="limit is 2000"):
            await store.append(blobs(*[a_group() for _ in range(5)]))

        assert (await store.status()).queued_groups == 0
        assert [result.status for result in await store.append(blobs(a_group()))] == ["accepted"]

    async def test_the_records_say_where_each_group_is(self, store: Store) -> None:
        trainer, env = await started(store)
        granted = await tickets(store, env, 3)
        await store.append(blobs(*[a_group(f"g{i}", ticket=ticket) for i, ticket in enumerate(granted)]))
        await store.lease(0, trainer)
        await store.append(blobs(replace(a_group("g3"), run_id="another")))

        assert await places(store) == {
            "g0": ("batched", 0, None),
            "g1": ("batched", 0, None),
            "g2": ("queued", None, None),
            "g3": ("retired", None, "other_run"),
        }

    async def test_the_records_come_in_pages(self, store: Store) -> None:
        await started(store)
        await store.append(blobs(*[a_group(f"g{i}", version=None) for i in range(5)]))

        first = await store.records(limit=2)
        assert first.next is not None
        second = await store.records(after=first.next, limit=3)

        assert [record.group_id for record in first.records + second.records] == [f"g{i}" for i in range(5)]
        assert second.next is None
        assert [record.oldest_version for record in second.records] == [None] * 3


class TestBatches:
    async def test_the_batch_of_a_step_is_the_same_whenever_it_is_asked_for(self, store: Store) -> None:
        trainer, env = await started(store)
        await post(store, await tickets(store, env, 4))

        first, second = await held(store, 0, trainer), await held(store, 1, trainer)

        assert await held(store, 0, trainer) == first
        assert not set(first) & set(second)

    async def test_oldest_versions_leave_first(self, store: Store) -> None:
        trainer, _ = await started(store, max_staleness=9)
        await store.set_policy(3, trainer)
        await store.append(blobs(*[a_group(f"v{v}", version=v) for v in (3, 1, 2, 0)]))

        assert [await held(store, step, trainer) for step in (0, 1)] == [["v0", "v1"], ["v2", "v3"]]

    async def test_a_batch_has_exactly_batch_size_sequences_of_whole_groups(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.append(blobs(a_group("three", n=3), a_group("two", n=2), a_group("one", n=1)))

        assert sorted(await held(store, 0, trainer)) == ["one", "three"]
        assert isinstance(await store.lease(1, trainer), NotReady)

    async def test_groups_that_do_not_sum_up_are_waited_for_with_their_sizes(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.append(blobs(a_group(n=3), a_group(n=3)))

        waiting = await store.lease(0, trainer)

        assert isinstance(waiting, NotReady)
        assert "sizes are [3]" in waiting.waiting_for
        status = await store.status()
        assert status.trainer_waits_for == waiting.waiting_for
        assert (status.largest_queued_group, status.group_sizes_queued) == (3, [3])

    async def test_shards_cover_the_batch_once_and_balance_its_tokens(self, store: Store) -> None:
        trainer, _ = await started(store, batch_size=16)
        await store.append(blobs(*[a_group(f"g{i}", completion=1 + 5 * i) for i in range(8)]))

        shards = [await store.lease(0, trainer, Shard(rank, 3)) for rank in range(3)]

        parts = [decode_groups(b"".join(shard.blobs)) for shard in shards if isinstance(shard, Batch)]
        assert sorted(group.group_id for part in parts for group in part) == [f"g{i}" for i in range(8)]
        tokens = [sum(group.n_tokens for group in part) for part in parts]
        assert max(tokens) - min(tokens) <= 2 * (3 + 36), "no further apart than one group"
        assert await held(store, 0, trainer, Shard(1, 3)) == [group.group_id for group in parts[1]]

    async def test_a_shard_may_be_empty(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.append(blobs(a_group(n=4)))

        assert len(await held(store, 0, trainer, Shard(0, 2))) == 1
        assert await held(store, 0, trainer, Shard(1, 2)) == []

    async def test_a_resumed_trainer_gets_the_same_batches_again_before_new_ones(self, store: Store) -> None:
        trainer, env = await started(store)
        await post(store, await tickets(store, env, 4))
        before = [await held(store, step, trainer) for step in (0, 1)]
        await store.ack(0, trainer, 1)

        resumed = await store.open_run(run_like())

        assert (resumed.acknowledged_step, resumed.committed_step, resumed.policy_version) == (1, 0, 1)
        assert [await held(store, step, resumed.session) for step in (0, 1)] == before

    async def test_a_trainer_that_resumes_with_a_smaller_bound_is_not_stalled_by_what_is_queued(
        self, store: Store
    ) -> None:
        _, env = await started(store, batch_size=4, max_staleness=2)
        granted = await tickets(store, env, 6)
        await store.append(blobs(*[a_group(f"g{i}", ticket=ticket) for i, ticket in enumerate(granted)]))

        resumed = (await store.open_run(a_run(batch_size=4, max_staleness=0))).session

        assert await held(store, 0, resumed) == ["g0", "g1"]
        assert isinstance(await store.lease(1, resumed), NotReady)
        assert (await store.status()).groups_retired == {"stale": 4}

    async def test_committed_steps_cannot_be_leased_again_and_later_ones_can(self, store: Store) -> None:
        trainer, env = await started(store)
        await post(store, await tickets(store, env, 4))
        await store.lease(0, trainer)
        await store.ack(0, trainer, 1)
        await store.lease(1, trainer)

        await store.commit(1, trainer)

        with pytest.raises(StepError, match="steps 1 to 2"):
            await store.lease(0, trainer)
        assert len(await held(store, 1, trainer)) == 2

    async def test_a_commit_before_its_acknowledgement_is_refused(self, store: Store) -> None:
        trainer, _ = await started(store)

        with pytest.raises(StepError, match="before its acknowledgement"):
            await store.commit(1, trainer)


class TestNack:
    async def test_the_groups_of_a_nacked_batch_come_again_but_for_those_it_names(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.append(blobs(*[a_group(f"g{i}") for i in range(4)]))
        await store.lease(0, trainer)
        await store.lease(1, trainer)

        result = await store.nack(0, NackRequest(session=trainer, reason="nan", retire=["g1"]))

        assert (result.requeued, result.retired) == (3, 1)
        status = await store.status()
        assert (status.formed_steps, status.queued_groups, status.groups_retired) == (0, 3, {"nack_nan": 1})
        assert status.envs[0].trained_tokens == 0
        assert await held(store, 0, trainer) == ["g0", "g2"]
        assert (await places(store))["g1"] == ("retired", None, "nack_nan")

    async def test_later_batches_stay_bound_to_nothing(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.append(blobs(*[a_group(f"g{i}") for i in range(4)]))
        first = await held(store, 0, trainer)
        await store.lease(1, trainer)

        await store.nack(1, NackRequest(session=trainer, reason="oom"))

        assert await held(store, 0, trainer) == first
        assert await held(store, 1, trainer) == ["g2", "g3"]

    async def test_what_is_acknowledged_or_not_formed_or_not_there_cannot_be_given_back(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.append(blobs(*[a_group(f"g{i}") for i in range(4)]))
        await store.lease(0, trainer)
        await store.ack(0, trainer, 1)
        await store.lease(1, trainer)

        for step in (0, 2):
            with pytest.raises(StepError, match="cannot be given back"):
                await store.nack(step, NackRequest(session=trainer, reason="x"))
        with pytest.raises(ProtocolError, match="'g0', which is in no batch"):
            await store.nack(1, NackRequest(session=trainer, reason="x", retire=["g2", "g0"]))
        with pytest.raises(FencedError):
            await store.nack(1, NackRequest(session=trainer + 1, reason="x"))

        assert await held(store, 1, trainer) == ["g2", "g3"]


class TestRun:
    async def test_an_older_trainer_is_fenced_off(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.open_run(run_like())

        for call in (
            store.lease(0, trainer),
            store.ack(0, trainer, None),
            store.commit(0, trainer),
            store.set_policy(1, trainer),
            store.renew_trainer(trainer),
        ):
            with pytest.raises(FencedError, match="taken over"):
                await call

    async def test_another_run_name_starts_clean(self, store: Store) -> None:
        _trainer, env = await started(store)
        first = await store.run_info()
        await post(store, await tickets(store, env))
        await store.register_server(InferenceServer(url="http://a"))

        second = await store.open_run(run_like(run_name="other"))

        status = await store.status()
        assert (second.session, second.policy_version) == (1, -1)
        assert second.run_id != first.run_id
        assert (status.run_name, status.queued_groups, status.groups_accepted) == ("other", 0, 0)
        assert (status.envs, status.inference_servers, await places(store)) == ([], [], {})

    async def test_a_closed_run_is_gone_and_its_name_is_free(self, store: Store) -> None:
        await store.close_run()
        first = await store.open_run(run_like())

        await store.close_run()

        with pytest.raises(NoRunError):
            await store.run_info()
        assert (await store.status()).envs == []
        again = await store.open_run(run_like())
        assert (again.session, again.run_id != first.run_id) == (1, True)

    async def test_a_trainer_that_lost_batches_that_were_let_go_is_refused(self, store: Store) -> None:
        trainer, _ = await started(store)
        await store.append(blobs(a_group(), a_group()))
        await store.lease(0, trainer)
        await store.ack(0, trainer, 1)
        await store.commit(1, trainer)

        with pytest.raises(StepError, match="newest checkpoint"):
            await store.open_run(run_like(start_step=0))

        assert (await store.open_run(run_like(start_step=1))).session == trainer + 1

    async def test_a_run_can_begin_at_a_checkpoint(self, store: Store) -> None:
        info = await store.open_run(run_like(start_step=7))

        assert (info.acknowledged_step, info.committed_step) == (7, 7)
        assert isinstance(await store.lease(7, info.session), NotReady)
        with pytest.raises(StepError, match="steps 7 to 7"):
            await store.lease(0, info.session)

    async def test_the_batch_size_cannot_change_under_batches_to_replay(self, store: Store) -> None:
        trainer, _ = await started(store)
        assert (await store.open_run(run_like(batch_size=2))).session == trainer + 1
        await store.append(blobs(a_group()))
        await store.lease(0, trainer + 1)

        with pytest.raises(ConfigError, match="batches of 2 to replay"):
            await store.open_run(run_like(batch_size=4))

    async def test_the_policy_version_never_goes_back(self, store: Store) -> None:
        trainer, _ = await started(store)

        await store.set_policy(5, trainer)
        await store.set_policy(3, trainer)

        assert (await store.run_info()).policy_version == 5

    async def test_refusals_name_the_fix_and_change_nothing(self, store: Store) -> None:
        with pytest.raises(NoRunError, match="atropos-trainer"):
            await store.run_info()
        with pytest.raises(NoRunError):
            await store.register_env(EnvRequest(name="env", group_size=2))
        trainer, _env = await started(store, group_size=2)
        with pytest.raises(ConfigError, match="--group_size 2"):
            await store.register_env(EnvRequest(name="odd", group_size=3))
        with pytest.raises(UnknownEnvError, match="not registered"):
            await store.append(blobs(a_group(), a_group(env_id=7)))
        with pytest.raises(StepError, match="cannot be leased"):
            await store.lease(5, trainer)
        with pytest.raises(StepError, match="never handed out"):
            await store.ack(0, trainer, None)

        status = await store.status()
        assert (status.queued_groups, len(status.envs)) == (0, 1)

    async def test_the_trainer_is_seen_when_it_calls(self, stores: Stores, store: Store) -> None:
        trainer, _ = await started(store)
        stores.clock.advance(40)
        silent = (await store.status()).trainer_last_seen_s
        await store.renew_trainer(trainer)

        assert (silent, (await store.status()).trainer_last_seen_s) == (40, 0)


class TestOldClients:
    async def test_groups_before_any_run_are_taken_and_adopted_by_the_next(self, store: Store) -> None:
        early = await store.append(blobs(a_group("g1", version=None), a_group("g2", env_id=9)), is_strict=False)
        with pytest.raises(NoRunError):
            await store.append(blobs(a_group()))

        trainer = (await store.open_run(run_like())).session

        assert [result.status for result in early] == ["accepted", "accepted"]
        assert await held(store, 0, trainer) == ["g1", "g2"]

    async def test_unknown_environments_are_taken_from_old_clients_only(self, store: Store) -> None:
        await started(store)

        results = await store.append(blobs(a_group(env_id=7)), is_strict=False)

        assert [result.status for result in results] == ["accepted"]

    async def test_a_group_of_unknown_version_is_never_stale(self, store: Store) -> None:
        trainer, _ = await started(store, max_staleness=0, batch_size=2)
        await store.append(blobs(a_group("g0", version=None), a_group("g1", version=None)), is_strict=False)
        await store.lease(0, trainer)
        await store.ack(0, trainer, 5)

        assert await held(store, 1, trainer) == ["g1"]

    async def test_an_old_environment_lives_while_it_asks(self, stores: Stores, store: Store) -> None:
        await started(store)
        stores.clock.advance(50)
        silent = (await store.status()).envs[0].last_seen_s

        assert silent == 50
        assert await store.touch_env(0)
        assert (await store.status()).envs[0].last_seen_s == 0
        assert not await store.touch_env(3)


class TestTickets:
    async def test_tickets_stop_at_the_staleness_bound_and_go_on_with_the_next_version(self, store: Store) -> None:
        trainer, env = await started(store, batch_size=4, max_staleness=1)

        first = await tickets(store, env, MANY)
        await post(store, first[:2])
        await store.lease(0, trainer)
        full = await tickets(store, env, MANY)
        await store.ack(0, trainer, 1)

        assert len(first) == 4, "two batches of two groups of two"
        assert full == []
        assert len(await tickets(store, env, MANY)) == 2

    async def test_no_group_starts_before_the_servers_run_a_known_version(self, store: Store) -> None:
        await store.open_run(run_like())
        env = await store.register_env(EnvRequest(name="env", group_size=2))

        assert await tickets(store, env.session) == []

    async def test_the_last_places_go_to_one_group_at_a_time_even_if_it_promises_more(self, store: Store) -> None:
        """Groups come smaller than promised at times: nobody else would ever fill what is left."""
        trainer, env = await started(store, batch_size=5, max_staleness=3, num_steps=1)
        [first, second] = await tickets(store, env, 2)
        await post(store, [first, second])  # 4 of 5 sequences

        [last] = await tickets(store, env, 2)
        assert await tickets(store, env, 2) == []
        await post(store, [last], n=1)

        assert len(await held(store, 0, trainer)) == 3
        assert await tickets(store, env, 2) == []

    async def test_tickets_end_with_the_last_step(self, store: Store) -> None:
        trainer, env = await started(store, batch_size=4, max_staleness=3, num_steps=1)

        granted = await tickets(store, env, 9)
        await post(store, granted)
        await store.lease(0, trainer)
        await store.ack(0, trainer, 1)
        grant = await store.grant_tickets(TicketRequest(env_id=0, session=env, sequences=2))

        assert len(granted) == 2, "one step is left, so one batch is enough"
        assert grant.is_finished
        with pytest.raises(StepError, match="num_steps"):
            await store.lease(1, trainer)

    async def test_an_expired_ticket_gives_its_place_back(self, stores: Stores) -> None:
        store = await stores.open(ticket_ttl_s=10)
        _, env = await started(store, max_staleness=0)
        await store.expire_tickets()
        kept, _lost = await tickets(store, env, 2)
        stores.clock.advance(8)
        alive = await store.renew_tickets(TicketUpdate(env_id=0, session=env, tickets=[kept, "unknown"]))
        stores.clock.advance(8)

        assert alive == [kept]
        assert await store.expire_tickets() == 1
        assert await store.expire_tickets() == 0
        assert len(await tickets(store, env, 9)) == 1
        assert (await store.status()).tickets_returned == {"expired": 1}

    async def test_returned_tickets_are_counted_by_reason(self, store: Store) -> None:
        _, env = await started(store)
        granted = await tickets(store, env, 3)

        first = await store.return_tickets(TicketUpdate(env_id=0, session=env, tickets=granted[:2], reason="too_long"))
        second = await store.return_tickets(TicketUpdate(env_id=0, session=env, tickets=granted))

        assert (sorted(first), second) == (sorted(granted[:2]), granted[2:])
        status = await store.status()
        assert status.tickets_returned == {"too_long": 2, "unused": 1}
        assert (status.tickets_outstanding, status.sequences_in_flight) == (0, 0)

    async def test_a_late_group_takes_a_free_place_or_is_retired_and_counted(self, store: Store) -> None:
        _, env = await started(store, max_staleness=0)
        lost = await tickets(store, env, 2)
        await store.return_tickets(TicketUpdate(env_id=0, session=env, tickets=lost, reason="shutdown"))

        found_place = await store.append(blobs(a_group(ticket=lost[0])))
        replacement = await tickets(store, env, 2)
        no_place = await store.append(blobs(a_group(ticket=lost[1])))

        assert found_place[0].status == "accepted"
        assert len(replacement) == 1
        assert (no_place[0].status, no_place[0].reason) == ("retired", "late")
        assert (await store.status()).groups_retired == {"late": 1}

    async def test_waiting_environments_share_the_places_by_weight(self, store: Store) -> None:
        _, heavy = await started(store, batch_size=16, max_staleness=0)
        light = (await store.register_env(EnvRequest(name="light", group_size=2, weight=1 / 3))).session
        all_of_it = await tickets(store, heavy, MANY)
        assert await tickets(store, light, MANY, env_id=1) == []
        await store.return_tickets(TicketUpdate(env_id=0, session=heavy, tickets=all_of_it))

        mine, theirs = await tickets(store, heavy, MANY), await tickets(store, light, MANY, env_id=1)

        assert (len(all_of_it), len(mine), len(theirs)) == (8, 6, 2)

    async def test_an_environment_that_stopped_asking_holds_no_share(self, stores: Stores) -> None:
        store = await stores.open(env_timeout_s=30)
        _, first = await started(store, batch_size=16, max_staleness=0)
        second = (await store.register_env(EnvRequest(name="second", group_size=2))).session
        granted = await tickets(store, first, MANY)
        await tickets(store, second, MANY, env_id=1)
        await store.return_tickets(TicketUpdate(env_id=0, session=first, tickets=granted))

        stores.clock.advance(31)

        assert len(await tickets(store, first, MANY)) == 8


class TestLatePolicies:
    async def straggler(self, store: Store, policy: str) -> tuple[int, int, str]:
        """A run whose next batch is full although an older group, which it must hold, is still in flight."""
        trainer, env = await started(store, batch_size=4, max_staleness=0, late_policy=policy)
        slow, fast = await tickets(store, env, 2)
        await post(store, [fast])
        await store.append(blobs(a_group("unknown", version=None)), is_strict=False)
        return trainer, env, slow

    async def test_wait_lets_the_batch_wait_for_a_group_that_must_be_in_it(self, store: Store) -> None:
        trainer, _, slow = await self.straggler(store, "wait")

        waiting = await store.lease(0, trainer)
        await store.append(blobs(a_group("slow", ticket=slow)))

        assert isinstance(waiting, NotReady)
        assert "1 older groups in flight" in waiting.waiting_for
        assert "slow" in await held(store, 0, trainer)

    @pytest.mark.parametrize(("policy", "reason"), [("requeue", "requeue"), ("drop", "stale")])
    async def test_the_other_policies_void_its_ticket_and_retire_it(
        self, store: Store, policy: str, reason: str
    ) -> None:
        trainer, env, slow = await self.straggler(store, policy)

        assert len(await held(store, 0, trainer)) == 2
        late = await store.append(blobs(a_group("slow", ticket=slow)))

        assert (late[0].status, late[0].reason) == ("retired", reason)
        assert await store.renew_tickets(TicketUpdate(env_id=0, session=env, tickets=[slow])) == []
        assert (await store.status()).tickets_returned == {policy: 1}

    async def test_only_the_groups_that_are_in_the_way_are_given_up(self, store: Store) -> None:
        trainer, env = await started(store, batch_size=4, max_staleness=1, late_policy="drop")
        slow, *fast = await tickets(store, env, 3)
        await post(store, fast)
        await store.lease(0, trainer)
        await store.ack(0, trainer, 1)
        (newer,) = await tickets(store, env)
        await store.append(blobs(a_group(version=1), a_group(version=1)))

        assert len(await held(store, 1, trainer)) == 2

        update = TicketUpdate(env_id=0, session=env, tickets=[slow, newer])
        assert await store.renew_tickets(update) == [newer]


class TestMinimumAllocation:
    async def two_environments(self, store: Store) -> int:
        trainer, _ = await started(store, max_staleness=9)
        await store.register_env(EnvRequest(name="promised", group_size=2, min_batch_allocation=0.5))
        await store.append(blobs(*[a_group(f"g{i}") for i in range(3)]))
        return trainer

    async def test_a_batch_waits_for_an_environment_that_was_promised_a_share(self, store: Store) -> None:
        trainer = await self.two_environments(store)

        waiting = await store.lease(0, trainer)
        await store.append(blobs(a_group("promised", env_id=1)))

        assert isinstance(waiting, NotReady)
        assert "promised 2 of 4" in waiting.waiting_for
        assert await held(store, 0, trainer) == ["g0", "promised"]

    async def test_the_share_is_given_back_after_a_while(self, stores: Stores) -> None:
        store = await stores.open(allocation_wait_s=10, env_timeout_s=1000)
        trainer = await self.two_environments(store)
        assert isinstance(await store.lease(0, trainer), NotReady)
        stores.clock.advance(9)
        assert isinstance(await store.lease(0, trainer), NotReady)
        stores.clock.advance(1)

        assert await held(store, 0, trainer) == ["g0", "g1"]

    async def test_an_environment_that_left_is_not_waited_for(self, store: Store) -> None:
        trainer = await self.two_environments(store)

        await store.disconnect_env(1)

        assert await held(store, 0, trainer) == ["g0", "g1"]


class TestEnvironmentsAndServers:
    async def test_a_restarted_environment_keeps_its_id_and_voids_its_old_tickets(self, store: Store) -> None:
        _, env = await started(store, max_staleness=0)
        await tickets(store, env, 2)

        again = await store.register_env(EnvRequest(name="env", group_size=2))

        assert again.env_id == 0
        assert len(await tickets(store, again.session, 9)) == 2
        assert (await store.status()).tickets_returned == {"env_restarted": 2}
        with pytest.raises(UnknownEnvError):
            await tickets(store, env)

    async def test_an_environment_that_leaves_voids_its_tickets_and_keeps_its_groups(self, store: Store) -> None:
        _, env = await started(store)
        granted = await tickets(store, env, 2)
        await post(store, granted[:1])

        assert await store.disconnect_env(0)

        status = await store.status()
        assert (status.tickets_outstanding, status.queued_groups, status.envs[0].is_connected) == (0, 1, False)
        assert status.tickets_returned == {"env_left": 1}
        assert not await store.disconnect_env(5)
        with pytest.raises(UnknownEnvError, match="register again"):
            await tickets(store, env)

    async def test_the_status_counts_for_each_environment(self, store: Store) -> None:
        trainer, env = await started(store)
        await store.register_env(EnvRequest(name="other", group_size=2, weight=2.5, min_batch_allocation=0.1))
        await post(store, await tickets(store, env, 3))
        await tickets(store, env)
        await store.lease(0, trainer)

        first, second = (await store.status()).envs

        assert (first.name, first.groups_accepted, first.queued_groups, first.queued_sequences) == ("env", 3, 1, 2)
        assert (first.tickets, first.trained_tokens) == (1, 2 * 14)
        assert (second.weight, second.min_batch_allocation, second.groups_accepted) == (2.5, 0.1, 0)

    async def test_inference_servers_join_are_seen_and_leave(self, stores: Stores, store: Store) -> None:
        await store.register_server(InferenceServer(url="http://a"))
        stores.clock.advance(5)
        await store.register_server(InferenceServer(url="http://b", role="teacher", policy_version=3))

        servers = {entry.server.url: entry for entry in (await store.status()).inference_servers}

        assert {url: entry.last_seen_s for url, entry in servers.items()} == {"http://a": 5, "http://b": 0}
        assert (servers["http://b"].server.role, servers["http://b"].server.policy_version) == ("teacher", 3)
        assert await store.remove_server("http://a")
        assert not await store.remove_server("http://a")
        assert [entry.server.url for entry in (await store.status()).inference_servers] == ["http://b"]


def _from_any_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


class TestWatching:
    async def test_waiters_are_woken_and_events_are_told(self, store: Store) -> None:
        capacity, queue, events = asyncio.Event(), asyncio.Event(), asyncio.Queue[tuple[str, str]]()
        loop = asyncio.get_running_loop()

        def on_event(kind: str, text: str) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (kind, text))

        store.on_capacity = partial(_from_any_thread, loop, capacity)
        store.on_queue = partial(_from_any_thread, loop, queue)
        store.on_event = on_event

        trainer, _ = await started(store)
        await store.append(blobs(a_group(), a_group()))
        await store.lease(0, trainer)

        async with asyncio.timeout(10):
            await capacity.wait()
            await queue.wait()
            kinds = [(await events.get())[0] for _ in range(4)]
        assert kinds == ["run_opened", "env_joined", "policy_published", "batch_formed"]


class TestConcurrency:
    async def test_many_callers_at_once_lose_nothing_and_repeat_nothing(self, store: Store) -> None:
        trainer, _ = await started(store, batch_size=8, max_staleness=3)
        sessions = [
            (await store.register_env(EnvRequest(name=f"env-{i}", group_size=2))).session for i in range(8)
        ]  # env_id 1 to 8
        accepted: set[str] = set()
        trained: list[str] = []
        steps = 12

        async def environment(env_id: int, session: int) -> None:
            while len(trained) < steps * 4:
                for ticket in await tickets(store, session, 2, env_id=env_id):
                    version = (await store.run_info()).policy_version
                    group = a_group(env_id=env_id, version=version, ticket=ticket)
                    results = await store.append(blobs(group)) + await store.append(blobs(group))
                    assert [result.status for result in results] == ["accepted", "duplicate"]
                    accepted.add(group.group_id)
                await asyncio.sleep(0)

        async def train() -> None:
            for step in range(steps):
                while isinstance(await store.lease(step, trainer), NotReady):  # noqa: ASYNC110  (without a pause on purpose)
                    await asyncio.sleep(0)
                first, second = [await held(store, step, trainer, Shard(rank, 2)) for rank in (0, 1)]
                trained.extend(first + second)
                await store.ack(step, trainer, step + 1)

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(train())
            for i, session in enumerate(sessions):
                tasks.create_task(environment(i + 1, session))

        found = await places(store)
        assert len(trained) == len(set(trained)) == steps * 4
        assert {group_id for group_id, (state, _, _) in found.items() if state == "batched"} == set(trained)
        assert {group_id for group_id, (state, _, _) in found.items() if state != "retired"} == accepted
        status = await store.status()
        assert status.groups_accepted == len(accepted)
        assert status.queued_groups == len(accepted) - len(trained)


class TestRestart:
    @pytest.fixture(autouse=True)
    def _durable(self, stores: Stores) -> None:
        if not stores.is_durable:
            pytest.skip("keeps nothing")

    async def test_everything_survives_a_restart_of_the_server(self, stores: Stores) -> None:
        store = await stores.open()
        trainer, env = await started(store)
        granted = await tickets(store, env, 4)
        await store.append(blobs(*[a_group(f"g{i}", ticket=ticket) for i, ticket in enumerate(granted[:3])]))
        await store.register_server(InferenceServer(url="http://a"))
        batch = await held(store, 0, trainer)
        before = await counted(store)

        store = await stores.reopen(store)

        assert await counted(store) == before
        assert await held(store, 0, trainer) == batch
        assert await store.known(["g0", "g9"]) == {"g0"}
        assert await store.return_tickets(TicketUpdate(env_id=0, session=env, tickets=granted)) == [granted[3]]

    async def test_groups_before_any_run_survive_too(self, stores: Stores) -> None:
        store = await stores.open()
        await store.append(blobs(a_group("g1"), a_group("g2")), is_strict=False)

        store = await stores.reopen(store)

        trainer = (await store.open_run(run_like())).session
        assert await held(store, 0, trainer) == ["g1", "g2"]

    async def test_a_new_run_stays_clean_after_a_restart(self, stores: Stores) -> None:
        store = await stores.open()
        await started(store)
        await store.append(blobs(a_group("old")))
        await store.open_run(run_like(run_name="other"))

        store = await stores.reopen(store)

        assert await places(store) == {}
        assert (await store.run_info()).run_name == "other"
