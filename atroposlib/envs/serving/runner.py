"""The collection loop: a ticket starts a group; the loop ends with the run, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.eval_handling import training_limit
from atroposlib.envs.metrics import finish_reason_shares
from atroposlib.envs.server_handling.pool.registered_servers import servable_urls
from atroposlib.envs.serving.courier import Courier, GroupServer
from atroposlib.envs.serving.evaluations import Evaluations
from atroposlib.envs.serving.group_work import GroupWork, Job
from atroposlib.envs.serving.membership import Membership, Registrar, publishes_versions
from atroposlib.envs.serving.memory import settle_memory
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.run_status import StatusDict, offpolicy_limit, status_dict
from atroposlib.envs.serving.spool import Spool
from atroposlib.envs.serving.stats import EnvStats
from atroposlib.envs.serving.tickets import TicketBook, TicketOffice
from atroposlib.errors import AtroposError, ConfigError
from atroposlib.type_definitions import ScoredDataGroup
from atroposlib.wire.models import EnvInfo, EnvRequest, Status, Ticket, TicketGrant

log = logging.getLogger(__name__)

NO_ITEM_PAUSE_S = 0.5
METRICS_PERIOD_S = 2.0
STATUS_PERIOD_S = 2.0
"""How soon a step is noticed while no ticket is asked for."""
FAREWELL_S = 5.0
UNDELIVERED_FACTOR = 2
"""Groups in hand for each worker: what waits for the rollout server while it is away stays bounded."""

Farewell: TypeAlias = Callable[[EnvInfo], Awaitable[None]]
"""Tells the rollout server that the environment of this registration is gone."""


class RolloutServer(Registrar, TicketOffice, GroupServer, Protocol):
    """What the runner needs of the rollout client."""

    async def status(self) -> Status:
        """Counters of the run."""
        ...


class _Stop(Exception):  # noqa: N818
    """Ends the task group; never leaves this module."""


class EnvRunner:
    """Runs one environment against a rollout server until the run is finished or stop() is called.

    A rollout that fails for reasons outside the policy costs its own group. A configuration error, or a long row of
    exceptions out of the environment's own code, ends the run.

    Args:
        env: the environment; its setup() is called here.
        client: the rollout server.
        records: where ledger, sample rollouts and metrics go.
        spool: where groups wait while the rollout server is away; None: in memory.
        farewell: says goodbye at the end; None: the server finds out by itself.
    """

    def __init__(
        self,
        env: BaseEnv,
        client: RolloutServer,
        records: RunRecords,
        *,
        spool: Spool | None = None,
        farewell: Farewell | None = None,
    ) -> None:
        self._env = env
        self._config = env.config
        self._client = client
        self._records = records
        self._farewell = farewell
        self.stats = EnvStats()
        self._membership = Membership(client, _env_request(env), deadline_s=self._config.server_deadline_s)
        self._tickets = TicketBook(client, self._membership, sequences=self._config.group_size)
        self._courier = Courier(client, self._membership, spool)
        self._retries: deque[Job] = deque()
        self._room = asyncio.Event()
        """Set when there may be room for another group."""
        self._work = GroupWork(
            env, self._tickets, self._courier, self.stats, records, self._retries, on_room=self._room.set
        )
        self._evaluations = Evaluations(env, records, on_end=self._room.set)
        self._next: Job | None = None
        """Taken from the environment, and not started yet."""
        self._info: EnvInfo | None = None
        self._policy_version = -1
        self._is_run_over = False
        self._progress = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    def stop(self) -> None:
        """End soon: rollouts in flight are given up, their tickets returned."""
        self._stopping.set()

    async def run(self) -> None:
        """Collect until the run is finished.

        Raises:
            ServerUnreachableError: the rollout server, or a run on it, was missing for server_deadline_s.
            ConfigError: server or environment are set up wrongly.
        """
        self._env.metrics_sink, self._env.run_link = self._records.metrics, self
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._end_when_told())
                await self._env.setup()
                await self._enter()
                await self._work.deliver_left_over()
                self._tasks.create_task(self._report())
                self._tasks.create_task(self._follow_run())
                while not self._is_run_over:
                    await self._round()
                log.info("run finished at step %d", self._env.curr_step)
                await self._evaluations.finish()
                self._courier.is_run_over = True
                self._stopping.set()
        except* _Stop:
            pass
        finally:
            await self._say_goodbye()

    async def _enter(self) -> None:
        await self._env.register_env()
        self._info = self._membership.info
        self._env.server.train_only_on_published_versions(publishes_versions(self._info.run))
        assert self._tasks is not None
        self._tasks.create_task(self._tickets.keep_alive())
        self._tasks.create_task(self._courier.run())
        await self._env.get_server_info()
        await self._env.setup_wandb()
        await self._env.get_status()

    async def _end_when_told(self) -> None:
        await self._stopping.wait()
        raise _Stop

    # What the environment asks (RunLink)

    async def join(self) -> EnvInfo:
        """See RunLink.join."""
        return self._membership.info if self._membership.is_joined else await self._membership.join()

    async def status(self) -> StatusDict:
        """See RunLink.status. The step never goes back within a run: an answer may be older than what a grant said."""
        status = await self._client.status()
        info = self._membership.info
        figures = status_dict(status, env_id=info.env_id, group_size=self._config.group_size)
        if status.run_id == info.run.run_id:
            if self._config.servers_from_registry:
                await self._env.server.sync_servers(servable_urls(status))
            self._policy_version = max(self._policy_version, status.policy_version)
            self._is_run_over |= self._is_last(status.step) or 0 < status.num_steps <= status.step
        else:
            figures["current_step"] = 0
        figures["current_step"] = max(figures["current_step"], self._env.curr_step)
        return figures

    async def admit(self) -> None:
        """See RunLink.admit."""
        room = await self._wait_for_room()
        self._next = self._next or await self._take_job()
        if self._next is None:
            await asyncio.sleep(NO_ITEM_PAUSE_S)
            return
        info, grant = await self._tickets.request(room)
        await self._note_info(info)
        await self._note_progress(grant)
        if grant.is_finished or self._is_last(grant.step):
            self._is_run_over = True
            return
        started = 0
        for ticket in grant.tickets:
            # An evaluation that has just begun, or other groups, may have taken the room since it was asked for.
            if self._room_now() <= 0 or not await self._start(ticket, info):
                break
            started += 1
        self._env.workers_added_list.append(started)
        reason = "evaluation" if self._evaluations.is_running else "no_item"
        await self._tickets.give_back([ticket.ticket for ticket in grant.tickets[started:]], reason)

    def start_evaluation(self, step: int) -> None:
        """See RunLink.start_evaluation."""
        assert self._tasks is not None
        self._evaluations.start(self._tasks, step=step, policy_version=self._policy_version)

    def note_group(self, group: ScoredDataGroup, trained: Sequence[int], reason: str | None) -> None:
        """See RunLink.note_group."""
        self._work.note_group(group, trained, reason)

    async def send(self, groups: Sequence[ScoredDataGroup]) -> None:
        """See RunLink.send."""
        await self._work.send(groups)

    def metrics(self) -> dict[str, Any]:
        """See RunLink.metrics."""
        return finish_reason_shares(self.stats.finish_reasons)

    # Admission

    async def _round(self) -> None:
        """One round of admission, which the environment may shape. One that returns at once must not spin."""
        start, admitted = time.monotonic(), self.stats.rounds
        await self._env.add_train_workers()
        self._env.last_loop_time = time.monotonic() - start
        self._env.mainloop_timings.append(self._env.last_loop_time)
        if self.stats.rounds == admitted:
            await asyncio.sleep(NO_ITEM_PAUSE_S)

    async def _start(self, ticket: Ticket, info: EnvInfo) -> bool:
        job, self._next = self._next or await self._take_job(), None
        if job is None:
            return False
        assert self._tasks is not None
        task = self._tasks.create_task(self._work.run(job, ticket, info))
        self._env.workers.add(task)
        task.add_done_callback(self._note_end)
        return True

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._env.workers.discard(task)
        self._room.set()

    async def _wait_for_room(self) -> int:
        while (room := self._room_now()) <= 0 and not self._is_run_over:
            self._room.clear()
            await self._room.wait()
        self.stats.rounds += 1
        return max(1, room)

    def _room_now(self) -> int:
        """Groups that may start now. One that is being delivered needs no inference, so it takes no worker's place."""
        limit = training_limit(
            self._config.eval_handling,
            max_in_flight=self._env.max_num_workers,
            ratio=self._config.eval_limit_ratio,
            is_evaluating=self._evaluations.is_running,
        )
        in_hand = len(self._env.workers)
        rooms = [limit - (in_hand - self._work.delivering), UNDELIVERED_FACTOR * self._env.max_num_workers - in_hand]
        if "max_batches_offpolicy" in self._config.model_fields_set:
            batch, figures = self._env.derived_batch_size, self._env.status_dict
            bound = offpolicy_limit(self._config.max_batches_offpolicy, batch, self._config.group_size, figures)
            rooms += [] if bound is None else [bound - in_hand]
        return min(rooms)

    async def _take_job(self) -> Job | None:
        """Second tries first, then the environment's backlog, newest first, then new items."""
        if self._retries:
            return self._retries.popleft()
        item = self._env.backlog.pop() if self._env.backlog else await self._env.get_next_item()
        return None if item is None else Job(item)

    # Progress

    async def _note_info(self, info: EnvInfo) -> None:
        """Another registration: in the same run only the id is new, in another run everything is."""
        before, self._info = self._info, info
        if before is None or before is info:
            return
        self._env.env_id = info.env_id
        if before.run.run_id != info.run.run_id:
            self._policy_version = -1
            self._env.server.train_only_on_published_versions(publishes_versions(info.run))
            await self._env.register_env()
            await self._env.get_server_info()

    async def _note_progress(self, grant: TicketGrant) -> None:
        self._policy_version = grant.policy_version
        if self._env.status_dict is not None:
            self._env.status_dict["current_step"] = max(grant.step, self._env.curr_step)
        await self._check_step()

    async def _check_step(self) -> None:
        async with self._progress:
            try:
                await self._env.env_step_checks()
            except ConfigError:
                raise
            except Exception:
                # Metrics and checkpoints of the author's own may be broken; rollouts are not.
                log.exception("%s failed at step %d", type(self._env).__name__, self._env.curr_step)

    async def _follow_run(self) -> None:
        """Notice steps also while no ticket is asked for: all workers busy, or an evaluation in the way."""
        await asyncio.sleep(STATUS_PERIOD_S)
        settle_memory()  # by now the first requests have loaded what they load
        while True:
            await asyncio.sleep(STATUS_PERIOD_S)
            await self._env.get_status()
            await self._check_step()
            self._room.set()

    def _is_last(self, step: int) -> bool:
        return bool(0 < self._config.total_steps <= step)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(METRICS_PERIOD_S)
            self._records.metrics(self._snapshot())

    def _snapshot(self) -> dict[str, Any]:
        server = self._env.server
        return {
            "env": self._env.display_name,
            "step": self._env.curr_step,
            "policy_version": self._policy_version,
            **self.stats.snapshot(sampled_tokens=server.sampled_tokens, busy_s=server.busy.seconds),
            "env/tickets_lost": self._tickets.lost,
            "env/groups_in_flight": len(self._env.workers),
            "env/groups_spooled": self._courier.spooled,
            "env/evaluations_in_flight": int(self._evaluations.is_running),
            "env/requests_in_flight": server.in_flight,
            "env/tickets_held": len(self._tickets),
            "env/servers_healthy": sum(one.server_healthy for one in server.servers),
        }

    async def _say_goodbye(self) -> None:
        """Return what is held, close what is open; never longer than a moment."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._tickets.leave("shutdown")
                if self._farewell is not None and self._membership.is_joined:
                    await self._farewell(self._membership.info)
        except (AtroposError, TimeoutError) as error:
            log.warning("could not say goodbye, the tickets will expire: %s", error)
        self._courier.close()
        self._records.metrics(self._snapshot())
        self._env.run_link = None


def _env_request(env: BaseEnv) -> EnvRequest:
    config = env.config
    return EnvRequest(
        name=env.display_name,
        group_size=config.group_size,
        max_token_len=config.max_token_length,
        weight=max(0.0, config.inference_weight),
        min_batch_allocation=config.min_batch_allocation,
    )
