"""The collection loop: a ticket starts a group, the group is delivered or its ticket given back with a reason."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.delivery import drop_reason, wire_group
from atroposlib.envs.groups_file import GroupsFile
from atroposlib.envs.membership import Membership, Registrar
from atroposlib.envs.records import RunRecords
from atroposlib.envs.server_handling.provenance import Origin, remember_origins
from atroposlib.envs.stats import EnvStats
from atroposlib.envs.tickets import TicketBook, TicketOffice
from atroposlib.errors import AtroposError, ConfigError, NoRunError, ProtocolError, RolloutError, UnknownEnvError
from atroposlib.type_definitions import MASKED, Item, ScoredDataGroup
from atroposlib.wire.columns import Group, new_group_id
from atroposlib.wire.models import EnvInfo, EnvRequest, GroupResult, Ticket, TicketGrant

log = logging.getLogger(__name__)

NO_ITEM_PAUSE_S = 0.5
METRICS_PERIOD_S = 2.0
ITEM_TRIES = 3
"""Rollouts of one item before infrastructure failures make the runner drop it."""
MAX_ENV_ERRORS_IN_A_ROW = 32
FAREWELL_S = 5.0


class RolloutServer(Registrar, TicketOffice, Protocol):
    """What the runner needs of the rollout client."""

    async def post_groups(self, groups: Sequence[Group]) -> list[GroupResult]:
        """Deliver groups."""
        ...


@dataclass(frozen=True)
class Job:
    """An item on its way, and how often it was tried."""

    item: Item
    tries: int = 0


class Dropped(Exception):  # noqa: N818 - control flow, not an error: the group ends here and its ticket goes back
    """A group that will not be sent, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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
    """

    def __init__(self, env: BaseEnv, client: RolloutServer, records: RunRecords) -> None:
        self._env = env
        self._config = env.config
        self._client = client
        self._records = records
        self.stats = EnvStats()
        request = EnvRequest(
            name=env.display_name,
            group_size=self._config.group_size,
            max_token_len=self._config.max_token_length,
            weight=max(0.0, self._config.inference_weight),
            min_batch_allocation=self._config.min_batch_allocation,
        )
        self._membership = Membership(client, request, deadline_s=self._config.server_deadline_s)
        self._tickets = TicketBook(client, self._membership, sequences=self._config.group_size)
        self._max_in_flight: int = self._config.resolve_max_num_workers(len(env.server.servers))
        self._in_flight = 0
        self._slot_freed = asyncio.Event()
        self._backlog: deque[Job] = deque()
        self._policy_version = -1
        self._env_errors_in_a_row = 0
        self._evaluation: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._groups_file = GroupsFile(path) if (path := self._config.data_path_to_save_groups) else None

    def stop(self) -> None:
        """End soon: rollouts in flight are given up, their tickets returned."""
        self._stopping.set()

    async def run(self) -> None:
        """Collect until the run is finished.

        Raises:
            ServerUnreachableError: the rollout server, or a run on it, was missing for server_deadline_s.
            ConfigError: server or environment are set up wrongly.
        """
        self._env.server.train_only_on_published_versions()
        self._env.metrics_sink = self._records.metrics
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._end_when_told())
                await self._env.setup()
                await self._membership.join()
                run = self._membership.info.run
                # Where an environment joins a running run it has crossed no evaluation step yet.
                self._env.curr_step, self._env.max_token_len = run.acknowledged_step, run.request.max_token_len
                tasks.create_task(self._tickets.keep_alive())
                tasks.create_task(self._report())
                await self._admit(tasks)
                await self._finish_evaluation()
                self._stopping.set()
        except* _Stop:
            pass
        finally:
            await self._say_goodbye()

    async def _end_when_told(self) -> None:
        await self._stopping.wait()
        raise _Stop

    # Admission

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        """Turn tickets into groups until the run is over."""
        while True:
            free = await self._free_slots()
            job = await self._next_job()
            if job is None:
                await asyncio.sleep(NO_ITEM_PAUSE_S)
                continue
            self._backlog.appendleft(job)
            info, grant = await self._tickets.request(free)
            await self._note_progress(grant, tasks)
            if grant.is_finished or 0 < self._config.total_steps <= grant.step:
                log.info("run finished at step %d", grant.step)
                return
            unused = [ticket.ticket for ticket in grant.tickets if not await self._start(ticket, info, tasks)]
            await self._tickets.give_back(unused, "no_item")

    async def _start(self, ticket: Ticket, info: EnvInfo, tasks: asyncio.TaskGroup) -> bool:
        job = await self._next_job()
        if job is None:
            return False
        self._in_flight += 1
        tasks.create_task(self._group(ticket, info, job, tasks))
        return True

    async def _free_slots(self) -> int:
        while self._in_flight >= self._max_in_flight:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        return self._max_in_flight - self._in_flight

    async def _next_job(self) -> Job | None:
        if self._backlog:
            return self._backlog.popleft()
        item = await self._env.get_next_item()
        return None if item is None else Job(item)

    # One group

    async def _group(self, ticket: Ticket, info: EnvInfo, job: Job, tasks: asyncio.TaskGroup) -> None:
        try:
            groups, origins = await self._collect(job)
            reasons = [self._check(group) for group in groups]
            self.stats.groups_dropped.update(reason for reason in reasons if reason is not None)
            to_send = [group for group, reason in zip(groups, reasons, strict=True) if reason is None]
            for i, group in enumerate(to_send):
                if i > 0:
                    # Only after the first group is away: holding a ticket while waiting for one would block for ever.
                    info, ticket = await self._one_more_ticket()
                await self._deliver(job, group, ticket, info, origins)
                self._tickets.used(ticket)
            if not to_send:
                self._env_errors_in_a_row = 0
                await self._tickets.give_back([ticket.ticket], reasons[-1] or "empty")
        except Dropped as dropped:
            self.stats.groups_dropped[dropped.reason] += 1
            await self._tickets.give_back([ticket.ticket], dropped.reason)
        finally:
            self._in_flight -= 1
            self._slot_freed.set()

    def _check(self, group: ScoredDataGroup) -> str | None:
        """Why the group must not be sent, None when it may.

        Raises:
            Dropped: it is no group.
        """
        try:
            reason = drop_reason(group, self._config, max_token_len=self._env.max_token_len)
            self._note_group(group)
        except (KeyError, TypeError, ValueError) as error:
            self._note_env_error(error)
            raise Dropped("env_error") from error
        return reason

    async def _collect(self, job: Job) -> tuple[list[ScoredDataGroup], dict[bytes, Origin]]:
        """Let the environment roll out one item.

        Raises:
            Dropped: nothing came of it; infrastructure failures put the item back for another try.
        """
        deadline_s = self._config.resolve_group_deadline_s()
        try:
            with remember_origins() as origins:
                async with asyncio.timeout(deadline_s) as scope:
                    result = await self._env.collect_trajectories(job.item)
                    outcome, backlog = result if isinstance(result, tuple) else (result, [])
                    outcome = await self._env.postprocess_histories(outcome) if outcome else None
        except ConfigError:
            raise
        except RolloutError as error:
            self._try_again(job, error)
            raise Dropped("rollout_error") from error
        except Exception as error:
            if isinstance(error, TimeoutError) and scope.expired():
                self._try_again(job, TimeoutError(f"took longer than {deadline_s} s"))
                raise Dropped("deadline") from error
            self._note_env_error(error)
            raise Dropped("env_error") from error
        finally:
            await self._env.cleanup()
        self._backlog.extend(Job(item) for item in backlog)
        groups = [group for group in (outcome if isinstance(outcome, list) else [outcome]) if group]
        if not groups:
            raise Dropped("empty")
        return groups, origins

    async def _deliver(
        self, job: Job, group: ScoredDataGroup, ticket: Ticket, info: EnvInfo, origins: dict[bytes, Origin]
    ) -> None:
        if self._config.include_messages and not group.get("messages"):
            group["messages"] = [
                [{"role": "user", "content": self._env.tokenizer.decode(tokens)}] for tokens in group["tokens"]
            ]
        try:
            columns = wire_group(
                group,
                group_id=new_group_id(),
                env_id=info.env_id,
                run_id=info.run.run_id,
                ticket=ticket.ticket,
                origins=origins,
                fallback_version=ticket.policy_version,
            )
            result = await self._post(columns, info)
        except (ProtocolError, ValueError) as error:
            self._note_env_error(error)
            raise Dropped("refused") from error
        self._env_errors_in_a_row = 0
        if result.status == "retired":
            self.stats.groups_dropped[f"retired_{result.reason}"] += 1
            if result.reason == "requeue":
                self._backlog.append(Job(job.item))
            return
        # "duplicate" answers our own repeated call: the first one was accepted though its answer was lost.
        self._records.accepted(result.group_id, columns.n_sequences)
        self.stats.groups_sent += 1
        self.stats.sequences_sent += columns.n_sequences
        if self._groups_file is not None:
            self._groups_file.write(group)
        self._records.rollout(self._sample_rollout(group, columns))

    async def _post(self, columns: Group, info: EnvInfo) -> GroupResult:
        """Send until the server has answered; the client rides out outages."""
        while True:
            if info.run.run_id != columns.run_id:
                raise Dropped("run_changed")
            try:
                [result] = await self._client.post_groups([replace(columns, env_id=info.env_id)])
            except (UnknownEnvError, NoRunError) as error:
                info = await self._membership.rejoin(info, error)
            else:
                return result

    async def _one_more_ticket(self) -> tuple[EnvInfo, Ticket]:
        while True:
            info, grant = await self._tickets.request(1)
            if grant.tickets:
                return info, grant.tickets[0]
            if grant.is_finished:
                raise Dropped("run_finished")

    def _try_again(self, job: Job, error: Exception) -> None:
        is_last = job.tries + 1 >= ITEM_TRIES
        log.warning("rollout failed, item %s: %s", "dropped" if is_last else "will be tried again", error)
        if not is_last:
            self.stats.rollouts_retried += 1
            self._backlog.append(Job(job.item, job.tries + 1))

    def _note_env_error(self, error: Exception) -> None:
        self._env_errors_in_a_row += 1
        log.error("%s made no usable group; it is dropped", type(self._env).__name__, exc_info=error)
        if self._env_errors_in_a_row >= MAX_ENV_ERRORS_IN_A_ROW:
            raise AtroposError(
                f"{type(self._env).__name__} failed on {self._env_errors_in_a_row} items in a row, last: {type(error).__name__}: {error}"
            ) from error

    async def _say_goodbye(self) -> None:
        """Return what is held, close what is open; never longer than a moment."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._tickets.leave("shutdown")
        except (AtroposError, TimeoutError) as error:
            log.warning("could not return tickets, they will expire: %s", error)
        self._records.metrics(self._snapshot())
        if self._groups_file is not None:
            self._groups_file.close()

    # Progress, evaluation, records

    async def _note_progress(self, grant: TicketGrant, tasks: asyncio.TaskGroup) -> None:
        self._policy_version = grant.policy_version
        before, self._env.curr_step = self._env.curr_step, grant.step
        if grant.step == before:
            return
        await self._env.wandb_log({})
        every = self._config.steps_per_eval
        if every > 0 and before // every < grant.step // every:
            if self._evaluation is not None and not self._evaluation.done():
                log.warning("the last evaluation still runs: none is started at step %d", grant.step)
            else:
                self._evaluation = tasks.create_task(self._evaluate(grant.step))

    async def _evaluate(self, step: int) -> None:
        self._env.eval_metrics = None
        version, started = self._policy_version, time.monotonic()
        try:
            returned = await self._env.evaluate()
        except ConfigError:
            raise
        except Exception:
            # The policy goes on learning while its measure is broken; the log says that and why.
            log.exception("evaluation at step %d failed", step)
            return
        metrics = self._env.eval_metrics or (returned if isinstance(returned, dict) else None)
        if metrics:
            self._records.evaluation(
                {
                    "step": step,
                    "policy_version": version,
                    "seconds": round(time.monotonic() - started, 2),
                    "metrics": metrics,
                }
            )

    async def _finish_evaluation(self) -> None:
        if self._evaluation is not None:
            await asyncio.wait([self._evaluation], timeout=self._config.resolve_group_deadline_s())

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
            "env/groups_in_flight": self._in_flight,
            "env/requests_in_flight": server.in_flight,
            "env/tickets_held": len(self._tickets),
            "env/servers_healthy": sum(one.server_healthy for one in server.servers),
        }

    def _note_group(self, group: ScoredDataGroup) -> None:
        self.stats.rewards.extend(group["scores"])
        lengths = [sum(label != MASKED for label in labels) for labels in group["masks"]]
        self.stats.completion_tokens.extend(lengths)
        self._env.completion_lengths.extend(lengths)

    def _sample_rollout(self, group: ScoredDataGroup, columns: Group) -> dict[str, Any]:
        """The group's first sequence, for people."""
        tokens, labels = group["tokens"][0], group["masks"][0]
        first = next((i for i, label in enumerate(labels) if label != MASKED), len(tokens))
        decode = self._env.tokenizer.decode if self._env.tokenizer is not None else str
        prompt, completion = decode(tokens[:first]), decode(tokens[first:])
        reward = float(group["scores"][0])
        self._env.rollouts_for_wandb.append([(prompt + completion, reward)])
        return {
            "env": self._env.display_name,
            "group_id": columns.group_id,
            "step": self._env.curr_step,
            "version": columns.version_range[1] if columns.version_range else None,
            "prompt": prompt,
            "completion": completion,
            "reward": reward,
            "rewards": [float(score) for score in group["scores"]],
        }
