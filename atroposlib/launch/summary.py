"""What came of a run, counted from the ledgers that its processes wrote independently of each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

from rich.table import Table

from atroposlib.launch.heldout import Change, heldout_change, heldout_rewards
from atroposlib.launch.jsonl import Line, read_jsonl, surviving_history
from atroposlib.launch.run_folder import RunFolder
from atroposlib.wire.models import GroupRecord


@dataclass(frozen=True)
class Account:
    """Where the sequences went that environments delivered."""

    sequences_trained: int
    """In the surviving history of weights."""
    sequences_lost: int
    """Accepted by the server, yet neither trained, nor waiting there, nor retired with a reason."""
    sequences_repeated: int
    """Trained again although the surviving history held them already."""
    sequences_waiting: int
    """Still queued or in a batch of a step that was never trained."""
    sequences_retired: dict[str, int]
    """By reason."""
    sequences_unledgered: int
    """Trained, but no environment noted their delivery: it died between the answer and its note."""
    lost_group_ids: list[str]
    repeated_group_ids: list[str]


def account(delivered: Iterable[Line], trained: Sequence[Line], server: Sequence[GroupRecord] | None) -> Account:
    """Follow every delivered group to its end.

    Args:
        delivered: the environments' ledger, {"group_id", "sequences"} after each 2xx answer.
        trained: the trainer's ledger, {"step", "groups", "sequences"} for each step, repeated steps included.
        server: the rollout server's records, or None when it could not be asked: then nothing counts as waiting.
    """
    sizes: dict[str, int] = {record.group_id: record.n_sequences for record in server or ()}
    accepted: dict[str, int] = {}
    for line in delivered:
        # A redelivery is answered as a duplicate and may be noted again: the same group.
        accepted[str(line["group_id"])] = int(line["sequences"])
    sizes |= accepted

    history = surviving_history(list(trained))
    trained_steps = {int(line["step"]) for line in history}
    times_trained = Counter(str(group_id) for line in history for group_id in line["groups"])
    repeated = sorted(group_id for group_id, times in times_trained.items() if times > 1)

    waiting, retired = 0, Counter[str]()
    held: set[str] = set()
    for record in server or ():
        if record.group_id in times_trained:
            continue
        if record.state == "retired" and record.reason:
            retired[record.reason] += record.n_sequences
            held.add(record.group_id)
        elif record.state == "queued" or (record.state == "batched" and record.step not in trained_steps):
            # Batched for a step that was trained without it: the trainer dropped it, so it is lost.
            waiting += record.n_sequences
            held.add(record.group_id)
    lost = sorted(group_id for group_id in accepted if group_id not in times_trained and group_id not in held)
    return Account(
        sequences_trained=sum(int(line["sequences"]) for line in history),
        sequences_lost=sum(accepted[group_id] for group_id in lost),
        sequences_repeated=sum((times_trained[group_id] - 1) * sizes.get(group_id, 1) for group_id in repeated),
        sequences_waiting=waiting,
        sequences_retired=dict(retired),
        sequences_unledgered=sum(sizes.get(group_id, 1) for group_id in times_trained if group_id not in accepted),
        lost_group_ids=lost,
        repeated_group_ids=repeated,
    )


@dataclass(frozen=True)
class Overlap:
    """How far sampling and training ran at the same time.

    Both busy times were measured while the two shared the machine. Each alone would have been faster, so this
    shows that they ran side by side; it does not show how much was won over taking turns.
    """

    wall_s: float
    """From the first training process's first wait for a batch to its last step."""
    sampling_busy_s: float | None
    """Seconds with at least one generation in flight, by the environments' samples of about every 2 s."""
    training_busy_s: float
    """Seconds in forward, backward, optimizer and weight push."""
    sum_s: float | None
    """The two together: what taking turns would have cost at these speeds."""


def overlap(metrics: Sequence[Line], env_metrics: Sequence[Line]) -> Overlap | None:
    """Wall time of the training phase against the busy times of its two sides; None before the first step."""
    steps = [line for line in metrics if "time" in line]
    if not steps:
        return None
    first = steps[0]
    begin = float(first["time"]) - _number(first, "time/step_s", 0.0)
    end = float(steps[-1]["time"])
    training = sum(_number(line, "time/train_s", 0.0) + _number(line, "time/sync_s", 0.0) for line in steps)
    sampling = _busy_s(env_metrics, begin, end)
    return Overlap(
        wall_s=round(end - begin, 2),
        sampling_busy_s=None if sampling is None else round(sampling, 2),
        training_busy_s=round(training, 2),
        sum_s=None if sampling is None else round(sampling + training, 2),
    )


def _busy_s(env_metrics: Sequence[Line], begin: float, end: float) -> float | None:
    """Seconds between begin and end with a request in flight in any environment; None when none was counted.

    The state at the end of an interval stands for the interval: right on average, however long the bursts are.
    """
    samples = [line for line in env_metrics if "env/requests_in_flight" in line and "time" in line]
    if not samples:
        return None
    in_flight: dict[str, bool] = {}
    busy, last = 0.0, begin
    for line in sorted(samples, key=lambda line: float(line["time"])):
        at = min(max(float(line["time"]), begin), end)
        in_flight[str(line.get("env", ""))] = bool(line["env/requests_in_flight"])
        busy += (at - last) * any(in_flight.values())
        last = at
    return busy


@dataclass(frozen=True)
class Summary:
    """summary.json. None stands for what was not measured."""

    run_id: str
    outcome: str
    """finished, or why the run ended early."""
    heldout_reward_before: float | None
    heldout_reward_after: float | None
    heldout_change: Change | None
    """By pairs of samples of the same item; None where the environment keeps none."""
    steps: int
    wall_s: float
    """All sessions of the run, start-up and evaluation included."""
    sequences_trained: int
    sequences_lost: int
    sequences_repeated: int
    sequences_waiting: int
    sequences_retired: dict[str, int]
    sequences_unledgered: int
    max_staleness_seen: int | None
    """Over every step that was ever taken, also those that a resumed trainer took again."""
    max_staleness_allowed: int | None
    weight_push_s_median: float | None
    tokens_trained: int
    restarts: dict[str, int]
    overlap: Overlap | None = None
    heldout_by_environment: dict[str, dict[str, float]] = field(default_factory=dict)
    lost_group_ids: list[str] = field(default_factory=list)
    repeated_group_ids: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write summary.json whole or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def summarise(folder: RunFolder, *, outcome: str = "finished", max_staleness_allowed: int | None = None) -> Summary:
    """Count everything from the files of the run folder."""
    trained = read_jsonl(folder.ledger / "trainer.jsonl")
    delivered = [line for path in sorted(folder.ledger.glob("env-*.jsonl")) for line in read_jsonl(path)]
    metrics = read_jsonl(folder.metrics)
    history = surviving_history(metrics)
    events = read_jsonl(folder.events)
    counted = account(delivered, trained, read_server_ledger(folder.server_ledger))
    evaluations = folder.evaluation("before"), folder.evaluation("after")
    before, after = map(heldout_rewards, evaluations)
    pushes = [float(line["time/sync_s"]) for line in metrics if line.get("time/sync_s")]
    return Summary(
        run_id=folder.run_id,
        outcome=outcome,
        heldout_reward_before=fmean(before.values()) if before else None,
        heldout_reward_after=fmean(after.values()) if after else None,
        heldout_change=heldout_change(*evaluations),
        steps=len(surviving_history(trained)) or len(history),
        wall_s=round(wall_s(events), 2),
        sequences_trained=counted.sequences_trained,
        sequences_lost=counted.sequences_lost,
        sequences_repeated=counted.sequences_repeated,
        sequences_waiting=counted.sequences_waiting,
        sequences_retired=counted.sequences_retired,
        sequences_unledgered=counted.sequences_unledgered,
        max_staleness_seen=max_staleness_seen(trained, metrics),
        max_staleness_allowed=max_staleness_allowed,
        weight_push_s_median=round(median(pushes), 3) if pushes else None,
        tokens_trained=int(sum(_number(line, "tokens/step", 0.0) for line in history)),
        restarts=restarts(events),
        overlap=overlap(metrics, read_jsonl(folder.env_metrics)),
        heldout_by_environment={
            name: {phase: rewards[name] for phase, rewards in (("before", before), ("after", after)) if name in rewards}
            for name in sorted(before | after)
        },
        lost_group_ids=counted.lost_group_ids,
        repeated_group_ids=counted.repeated_group_ids,
    )


def read_server_ledger(path: Path) -> list[GroupRecord] | None:
    """The records saved when the run ended; None when the server could not be asked."""
    if not path.is_file():
        return None
    return [GroupRecord.model_validate(record) for record in json.loads(path.read_text(encoding="utf-8"))]


def max_staleness_seen(trained: Sequence[Line], metrics: Sequence[Line]) -> int | None:
    """The stalest sequence of any step, by the trainer's ledger and by its metrics."""
    seen = [line["max_staleness"] for line in trained if line.get("max_staleness") is not None]
    seen += [line["staleness/max"] for line in metrics if line.get("staleness/max") is not None]
    return int(max(seen)) if seen else None


def restarts(events: Iterable[Line]) -> dict[str, int]:
    """Restarts of each process that was ever started; the short-lived ones only when there were any."""
    counts: dict[str, int] = {}
    for event in events:
        if "process" in event:
            counts.setdefault(str(event["process"]), 0)
            counts[str(event["process"])] += event.get("event") == "died"
    return {name: n for name, n in counts.items() if n or not name.startswith(("check-", "evaluate-"))}


def wall_s(events: Sequence[Line]) -> float:
    """Length of all sessions of a run. One that was killed ends with its last event."""
    total, begin, last = 0.0, None, 0.0
    for event in events:
        at = float(event["time"])
        if event["event"] == "session_started":
            total += last - begin if begin is not None else 0.0
            begin = at
        last = at
    return total + (last - begin if begin is not None else 0.0)


def _number(line: Line, key: str, otherwise: float) -> float:
    value = line.get(key)
    return float(value) if isinstance(value, int | float) else otherwise


def summary_table(summary: Summary) -> Table:
    """The summary for people."""
    table = Table(title=f"run {summary.run_id}: {summary.outcome}", show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    before, after = _shown(summary.heldout_reward_before), _shown(summary.heldout_reward_after)
    table.add_row("held-out reward", f"[bold green]{before} → {after}[/]   {gain(summary)}".rstrip())
    allowed = "" if summary.max_staleness_allowed is None else f" (allowed: {summary.max_staleness_allowed})"
    push = summary.weight_push_s_median
    rows = {
        "steps": str(summary.steps),
        "wall time": f"{summary.wall_s:.0f} s",
        "sequences trained": f"{summary.sequences_trained} ({summary.tokens_trained} tokens)",
        "sequences lost": _alarm(summary.sequences_lost),
        "sequences repeated": _alarm(summary.sequences_repeated),
        "sequences not needed": str(summary.sequences_waiting),
        "sequences retired": ", ".join(f"{n} {why}" for why, n in summary.sequences_retired.items()) or "0",
        "largest staleness": f"{_shown(summary.max_staleness_seen)}{allowed}",
        "weight push, median": "-" if push is None else f"{push:.2f} s",
        "restarts": ", ".join(f"{name} {n}" for name, n in summary.restarts.items() if n) or "none",
    }
    if summary.overlap is not None and summary.overlap.sampling_busy_s is not None:
        rows["sampling and training"] = (
            f"{summary.overlap.wall_s:.0f} s wall time for {summary.overlap.sampling_busy_s:.0f} s of sampling "
            f"and {summary.overlap.training_busy_s:.0f} s of training"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def gain(summary: Summary) -> str:
    """Of the held-out reward, with its 95 % interval where that is known; nothing where one side is not."""
    before, after = summary.heldout_reward_before, summary.heldout_reward_after
    if before is None or after is None:
        return ""
    return f"({summary.heldout_change or f'{after - before:+.3f}'})"


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _alarm(count: int) -> str:
    return f"[bold red]{count}[/]" if count else "0"
