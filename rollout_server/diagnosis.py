"""What is wrong with a run, told from its counters: each finding names who or what, the fact and the fix.

Pure: the same status and thresholds give the same findings. Every check is one function of CHECKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from atroposlib.wire.models import EnvStatus, Finding, Status
from rollout_server.group_sizes import batch_sizes_near, can_fill, divisors_near

SEVERITY_ORDER = ("error", "warning", "info")
FULL_QUEUE_SHARE = 0.8
"""Of max_queued_bytes; beyond it the queue is nearly full."""
REPEATED_SHARE = 0.1
"""Of the groups accepted; more duplicates than this are many."""
FAILED_SHARE = 0.2
"""Of the groups that ended; more that fail or expire than this are many."""
FEW = 10
"""Counts up to this are too small to judge a share by."""


@dataclass(frozen=True)
class Thresholds:
    """From when on something is a finding; the server's limits where it has some."""

    trainer_timeout_s: float = 300.0
    env_timeout_s: float = 120.0
    server_timeout_s: float = 120.0
    """An inference server that nobody reported for this long is silent."""
    max_queued_bytes: int = 8 << 30
    commit_lag_steps: int = 100
    """Acknowledged steps that no checkpoint holds."""


def diagnose(status: Status, thresholds: Thresholds) -> list[Finding]:
    """Everything that is wrong or will be, errors first; empty when all is well."""
    if status.run_id is None:
        return [_NO_RUN]
    if _is_finished(status):
        return [_finished(status)]
    findings = [finding for check in CHECKS for finding in check(status, thresholds)]
    return sorted(findings, key=lambda finding: SEVERITY_ORDER.index(finding.severity))


_NO_RUN = Finding(
    severity="error",
    subject="trainer",
    problem="no run is open: no trainer has registered, so environments have nothing to work for",
    fix="start atropos-trainer with rollout_server_url set to this server, or POST /v1/run",
)


def _is_finished(status: Status) -> bool:
    return 0 < status.num_steps <= status.step


def _finished(status: Status) -> Finding:
    return Finding(
        severity="info",
        subject="run",
        problem=f"run {status.run_name!r} has taken all of its {status.num_steps} steps",
        fix="raise num_steps to go on, or start the next run under another run_name",
    )


def _trainer(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    silent_s = status.trainer_last_seen_s
    if silent_s is not None and silent_s <= thresholds.trainer_timeout_s:
        return
    # A server that has just started cannot know whether the trainer is merely busy.
    since = "since this server started" if silent_s is None else f"for {silent_s:.0f} s"
    yield Finding(
        severity="warning" if silent_s is None else "error",
        subject="trainer",
        problem=f"silent {since} (trainer_timeout_s={thresholds.trainer_timeout_s:g}); step {status.step} of {status.num_steps}",
        fix=f"look at its log; start it again under run_name {status.run_name!r}: it goes on from its newest checkpoint",
    )


def _waiting_trainer(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    if status.trainer_waits_for is None or _held_up_by(status):
        return
    yield Finding(
        severity="info",
        subject="batch",
        problem=f"the trainer waits for {status.trainer_waits_for}",
        fix="nothing, if environments are at work (tickets_outstanding"
        f" is {status.tickets_outstanding}); to wait less, add environments or inference servers",
    )


def _policy(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    if status.policy_version >= 0:
        return
    yield Finding(
        severity="error",
        subject="trainer",
        problem="no policy version is published, so no group may start",
        fix="the trainer publishes once the inference servers hold its weights: see its log; other trainers POST /v1/policy",
    )


def _environments(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    if not status.envs:
        yield Finding(
            severity="error",
            subject="environments",
            problem="none has registered, so no group will ever come",
            fix="start one with --rollout_server_url set to this server",
        )
    elif not _live(status, thresholds):
        names = ", ".join(repr(env.name) for env in status.envs[:8])
        yield Finding(
            severity="error",
            subject="environments",
            problem=f"all {len(status.envs)} are lost ({names}): each is disconnected or silent",
            fix="start at least one again; under its old name it takes its place back",
        )


def _each_environment(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    for env in status.envs:
        subject = f"environment {env.name!r}"
        if not env.is_connected:
            yield Finding(
                severity="info",
                subject=subject,
                problem=f"said goodbye {env.last_seen_s:.0f} s ago; {env.queued_groups} of its groups are queued and will be used",
                fix="start it again under the same name if it should go on",
            )
        elif env.last_seen_s > thresholds.env_timeout_s:
            yield Finding(
                severity="warning",
                subject=subject,
                problem=f"silent for {env.last_seen_s:.0f} s (env_timeout_s={thresholds.env_timeout_s:g}),"
                f" holding {env.tickets} tickets",
                fix="look at its log and start it again under the same name; its tickets become void by themselves",
            )
        elif env.groups_accepted == 0 and status.step > 0:
            yield Finding(
                severity="warning",
                subject=subject,
                problem=f"has posted no group although the run is at step {status.step} (it holds {env.tickets} tickets)",
                fix="look in its log for failing rollouts; with weight 0, or with every group dropped, it never posts",
            )


def _batch_size(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    sizes = {env.group_size for env in status.envs if env.is_connected} | set(status.group_sizes_queued)
    if sizes and status.batch_size > 0 and not can_fill(sizes, status.batch_size):
        yield Finding(
            severity="error",
            subject="batch",
            problem=f"groups of {_listed(sizes)} sequences never sum to batch_size={status.batch_size}",
            fix=f"set batch_size to {_either(batch_sizes_near(sizes, status.batch_size))},"
            f" or group_size to {_either(divisors_near(status.batch_size, min(sizes)))}",
        )
        return
    for size in status.group_sizes_queued:
        if size > status.batch_size or not can_fill(sizes, status.batch_size - size):
            yield Finding(
                severity="warning",
                subject="queue",
                problem=f"queued groups of {size} sequences fit into no batch of {status.batch_size}"
                f" beside groups of {_listed(sizes)}",
                fix="have the environments send groups whose size divides batch_size, e.g."
                f" {_either(divisors_near(status.batch_size, size))}",
            )


def _minimum(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    for env in _held_up_by(status):
        yield Finding(
            severity="warning",
            subject=f"environment {env.name!r}",
            problem=f"holds up the batch: it is promised {env.min_batch_allocation:.0%} of it and has no group queued"
            f" ({env.tickets} in flight, silent for {env.last_seen_s:.0f} s)",
            fix="give it more inference capacity or lower its min_batch_allocation;"
            " after allocation_wait_s the batch leaves without it",
        )


def _queue(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    share = status.queued_bytes / thresholds.max_queued_bytes
    if share < FULL_QUEUE_SHARE:
        return
    yield Finding(
        severity="error" if share >= 1 else "warning",
        subject="queue",
        problem=f"holds {status.queued_bytes} of max_queued_bytes={thresholds.max_queued_bytes} ({share:.0%});"
        " beyond it groups are answered 429",
        fix="lower max_staleness, or raise --max-queued-bytes; if the trainer is lost, start it again",
    )


_RETIRED_FIXES: Mapping[str, str] = {
    "stale": "with tickets this cannot happen; have these environments ask for one before each group",
    "late": "their tickets were void when they came: renew tickets of long rollouts, or raise --ticket-ttl-s",
    "requeue": "late_policy=requeue gave up their tickets for the next batch; late_policy=wait would have waited for them",
    "other_run": "these environments worked for an earlier run; they register for this one by themselves or when started again",
}
_RETIRED_BY_TRAINER = "the trainer refused them (nack); its log says more"


def _retired(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    for reason, count in sorted(status.groups_retired.items()):
        if count:
            yield Finding(
                severity="warning",
                subject="groups",
                problem=f"{count} finished groups were put away untrained: {reason}",
                fix=_RETIRED_FIXES.get(reason, _RETIRED_BY_TRAINER),
            )


def _tickets(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    ended = status.groups_accepted + sum(status.tickets_returned.values())
    for reason, problem, fix in (
        (
            "expired",
            "tickets were not renewed in time: their rollouts died or hang",
            "look at the environments' logs; a rollout that may take long must renew, or raise --ticket-ttl-s",
        ),
        (
            "rollout_error",
            "groups came to nothing because their rollouts failed",
            "look at the environments' logs: inference server, grader or tool errors are named there",
        ),
    ):
        count = status.tickets_returned.get(reason, 0)
        if count > FEW and count > FAILED_SHARE * ended:
            yield Finding(severity="warning", subject="environments", problem=f"{count} of {ended} {problem}", fix=fix)


def _duplicates(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    count = status.groups_duplicate
    if count > FEW and count > REPEATED_SHARE * status.groups_accepted:
        yield Finding(
            severity="warning",
            subject="environments",
            problem=f"{count} groups were posted again beside {status.groups_accepted} accepted ones (each counts once)",
            fix="answers get lost on the way: look for time-outs between the environments and this server,"
            " or for two environments that make the same group_id",
        )


def _inference_servers(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    for entry in status.inference_servers:
        subject, version = f"inference server {entry.server.url}", entry.server.policy_version
        if entry.last_seen_s > thresholds.server_timeout_s:
            yield Finding(
                severity="warning",
                subject=subject,
                problem=f"not reported for {entry.last_seen_s:.0f} s",
                fix="is it running? start it again, or take it off the list with POST /v1/servers/leave",
            )
        elif entry.server.problem:
            yield Finding(
                severity="warning",
                subject=subject,
                problem=entry.server.problem,
                fix="see the trainer's log and the engine's; the server is tried again by itself",
            )
        elif entry.server.role == "policy" and version is not None and version < status.policy_version:
            yield Finding(
                severity="warning",
                subject=subject,
                problem=f"runs policy version {version}, {status.policy_version} is published",
                fix="the trainer's log names why the weight push failed; a server that joined late catches up with the next push",
            )


def _commits(status: Status, thresholds: Thresholds) -> Iterator[Finding]:
    lag = status.step - status.committed_step
    if lag > thresholds.commit_lag_steps:
        yield Finding(
            severity="warning",
            subject="trainer",
            problem=f"no checkpoint holds the last {lag} steps (committed: {status.committed_step}); their batches are kept"
            " for replay and a crash repeats them",
            fix="save checkpoints more often (save_steps), and see that the trainer commits after each",
        )


def _live(status: Status, thresholds: Thresholds) -> list[EnvStatus]:
    return [env for env in status.envs if env.is_connected and env.last_seen_s <= thresholds.env_timeout_s]


def _held_up_by(status: Status) -> list[EnvStatus]:
    """Environments whose promised share is missing while there are enough sequences for the batch."""
    if status.trainer_waits_for is None or status.queued_sequences < status.batch_size:
        return []
    return [env for env in status.envs if env.is_connected and env.min_batch_allocation and env.queued_sequences == 0]


def _listed(sizes: set[int]) -> str:
    return ", ".join(str(size) for size in sorted(sizes)[:16])


def _either(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)


CHECKS: tuple[Callable[[Status, Thresholds], Iterator[Finding]], ...] = (
    _trainer,
    _policy,
    _environments,
    _batch_size,
    _minimum,
    _queue,
    _inference_servers,
    _each_environment,
    _retired,
    _tickets,
    _duplicates,
    _commits,
    _waiting_trainer,
)
