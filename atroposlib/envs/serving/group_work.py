"""One group from its ticket to the server's answer: rolled out, delivered, or its ticket given back with a reason."""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.server_handling.sessions.provenance import Origins, remember_origins
from atroposlib.envs.serving.courier import Courier
from atroposlib.envs.serving.delivery import finish_reasons, wire_group
from atroposlib.envs.serving.records import RunRecords, sample_rollout
from atroposlib.envs.serving.stats import EnvStats
from atroposlib.envs.serving.tickets import TicketBook
from atroposlib.errors import (
    AtroposError,
    ConfigError,
    ProtocolError,
    RolloutDeadlineError,
    RunChangedError,
    infrastructure_error,
)
from atroposlib.type_definitions import Item, ScoredDataGroup
from atroposlib.wire.columns import Group, new_group_id
from atroposlib.wire.models import EnvInfo, GroupResult, Ticket

log = logging.getLogger(__name__)

ITEM_TRIES = 3
"""Rollouts of one item before infrastructure failures make the runner drop it."""
MAX_ENV_ERRORS_IN_A_ROW = 32


@dataclass(frozen=True)
class Job:
    """An item on its way, and how often it was tried."""

    item: Item
    tries: int = 0


@dataclass
class GroupRun:
    """What happens to one item. A send of the environment finds it in the context of its task."""

    job: Job
    info: EnvInfo
    ticket: Ticket | None
    """None once a group took it, or it was given back."""
    origins: Origins = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    """Why groups of this item were not sent."""
    refusal: Exception | None = None
    """The environment made what cannot be sent."""
    failure: Exception | None = None
    """The end of the run, should the environment have swallowed it."""
    is_delivered: bool = False


_current: ContextVar[GroupRun | None] = ContextVar("atropos_group_run", default=None)


class GroupWork:
    """Rolls items out and delivers what comes of them.

    Args:
        retries: where items go that deserve another try.
        on_room: called when an item needs inference no more.
    """

    def __init__(
        self,
        env: BaseEnv,
        tickets: TicketBook,
        courier: Courier,
        stats: EnvStats,
        records: RunRecords,
        retries: deque[Job],
        *,
        on_room: Callable[[], None],
    ) -> None:
        self._env = env
        self._tickets = tickets
        self._courier = courier
        self._stats = stats
        self._records = records
        self._retries = retries
        self._on_room = on_room
        self.delivering = 0
        """Items whose groups are on their way to the rollout server."""
        self._env_errors_in_a_row = 0

    async def run(self, job: Job, ticket: Ticket, info: EnvInfo) -> None:
        """Roll out one item.

        Raises:
            AtroposError: the run cannot go on.
        """
        run = GroupRun(job, info, ticket)
        _current.set(run)
        try:
            with remember_origins() as run.origins:
                await self._env.handle_env(self._start_item(job.item))
        except ConfigError:
            raise
        except Exception as error:
            if error is run.failure:
                raise
            self._note_failure(run, error)
        if run.failure is not None:
            raise run.failure
        await self._finish(run)

    def note_group(self, group: ScoredDataGroup, trained: Sequence[int], reason: str | None) -> None:
        """See RunLink.note_group. What the engine said of the ends goes into the group."""
        run = _current.get()
        reasons = finish_reasons(group, run.origins if run is not None else {})
        if reasons:
            group["finish_reasons"] = reasons
        self._stats.rewards.extend(group["scores"])
        self._stats.completion_tokens.extend(trained)
        self._stats.finish_reasons.update(said for said in reasons if said)
        if reason is not None:
            self._drop(run, reason)

    async def send(self, groups: Sequence[ScoredDataGroup]) -> None:
        """Deliver groups one after another. The first takes the item's ticket, each further one asks for its own.

        Raises:
            AtroposError: the run cannot go on.
        """
        self.delivering += 1
        self._on_room()
        try:
            await self._send(groups)
        finally:
            self.delivering -= 1

    async def _send(self, groups: Sequence[ScoredDataGroup]) -> None:
        run = _current.get()
        for group in groups:
            # Only after the one before is away: holding a ticket while waiting for one would block for ever.
            if run is not None and run.ticket is not None:
                ticket, run.ticket = run.ticket, None
            else:
                info, further = await self._one_more_ticket()
                if further is None:
                    self._drop(run, "run_finished")
                    return
                ticket, run = further, run or GroupRun(Job(None), info, None)
                run.info = info
            try:
                await self._deliver(group, ticket, run)
            except AtroposError as error:
                run.failure = error
                raise

    async def deliver_left_over(self) -> None:
        """Deliver what an earlier process of this environment could not."""
        entered: frozenset[str] | None = None
        async for group, result in self._courier.deliver_left_over():
            # That process may have died after the entry and before the spool forgot the group.
            entered = self._records.accepted_ids() if entered is None else entered
            if group.group_id not in entered:
                self._count(group, result)

    def _note_failure(self, run: GroupRun, error: Exception) -> None:
        failure = infrastructure_error(error)
        if failure is None:
            run.refusal = error
            self._drop(run, "env_error")
        else:
            self._try_again(run.job, failure)
            self._drop(run, "deadline" if isinstance(failure, RolloutDeadlineError) else "rollout_error")

    def _start_item(self, item: Item) -> str:
        item_uuid = str(uuid.uuid4())
        self._env.running_items[item_uuid] = {"item": item, "start_time": time.monotonic()}
        return item_uuid

    async def _finish(self, run: GroupRun) -> None:
        if run.ticket is not None:
            if not run.reasons:
                self._drop(run, "empty")
            ticket, run.ticket = run.ticket, None
            await self._tickets.give_back([ticket.ticket], run.reasons[-1])
        if run.refusal is not None:
            self._note_env_error(run.refusal)
        elif run.is_delivered or run.reasons:
            self._env_errors_in_a_row = 0

    async def _deliver(self, group: ScoredDataGroup, ticket: Ticket, run: GroupRun) -> None:
        try:
            columns = wire_group(
                group,
                group_id=new_group_id(),
                env_id=run.info.env_id,
                run_id=run.info.run.run_id,
                ticket=ticket.ticket,
                origins=run.origins,
                fallback_version=ticket.policy_version,
            )
            result = await self._courier.deliver(columns)
        except (ProtocolError, ValueError, TypeError, OverflowError) as error:
            run.refusal = error
            await self._give_up(run, ticket, "refused")
            return
        except RunChangedError:
            await self._give_up(run, ticket, "run_changed")
            return
        self._tickets.used(ticket)
        run.is_delivered = True
        is_taken = self._count(columns, result)
        # Only now: should the process die before, the next one delivers it again and makes the entry.
        self._courier.forget(columns)
        if not is_taken:
            if result.reason == "requeue":
                self._retries.append(Job(run.job.item))
            return
        self._env.items_sent_this_step += 1
        if self._records.is_kept:
            tokenizer, step = self._env.tokenizer, self._env.curr_step
            self._records.rollout(sample_rollout(group, columns, tokenizer, env=self._env.display_name, step=step))

    def _count(self, group: Group, result: GroupResult) -> bool:
        """Enter the server's answer into the books. Whether it took the group."""
        if result.status == "retired":
            self._stats.groups_dropped[f"retired_{result.reason}"] += 1
            return False
        # "duplicate" answers our own repeated call: the first one was accepted though its answer was lost.
        self._records.accepted(result.group_id, group.n_sequences)
        self._stats.groups_sent += 1
        self._stats.sequences_sent += group.n_sequences
        return True

    async def _give_up(self, run: GroupRun, ticket: Ticket, reason: str) -> None:
        self._drop(run, reason)
        await self._tickets.give_back([ticket.ticket], reason)

    def _drop(self, run: GroupRun | None, reason: str) -> None:
        self._stats.groups_dropped[reason] += 1
        if run is not None:
            run.reasons.append(reason)

    async def _one_more_ticket(self) -> tuple[EnvInfo, Ticket | None]:
        """A ticket for a further group; None when the run is over."""
        while True:
            info, grant = await self._tickets.request(1)
            if grant.tickets:
                return info, grant.tickets[0]
            if grant.is_finished:
                return info, None

    def _try_again(self, job: Job, error: Exception) -> None:
        is_last = job.tries + 1 >= ITEM_TRIES
        log.warning("rollout failed, item %s: %s", "dropped" if is_last else "will be tried again", error)
        if not is_last:
            self._stats.rollouts_retried += 1
            self._retries.append(Job(job.item, job.tries + 1))

    def _note_env_error(self, error: Exception) -> None:
        name = type(self._env).__name__
        self._env_errors_in_a_row += 1
        log.error("%s made no usable group; it is dropped", name, exc_info=error)
        if self._env_errors_in_a_row >= MAX_ENV_ERRORS_IN_A_ROW:
            raise AtroposError(
                f"{name} failed on {self._env_errors_in_a_row} items in a row, last: {type(error).__name__}: {error}"
            ) from error
