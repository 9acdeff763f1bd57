"""What `atropos view` shows: one look at a run's counters, findings and events as a picture for the terminal. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atroposlib.launch.view import duration
from atroposlib.wire.models import EnvStatus, Event, Finding, InferenceServerStatus, Status

SILENT_S = 120.0
NARROW = 104
"""Terminals of fewer columns get a narrower layout."""
EVENTS_SHOWN = 8
FINDINGS_SHOWN = 4
SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


@dataclass(frozen=True)
class Look:
    """What is known of a run at one moment."""

    status: Status
    findings: Sequence[Finding] = ()
    events: Sequence[Event] = ()
    """Oldest first."""
    steps_per_s: float | None = None
    problem: str = ""
    """Why this is not the present: the server does not answer."""


def render(look: Look, *, source: str, width: int = 100) -> RenderableType:
    """The whole view.

    Args:
        source: URL of the rollout server.
        width: columns of the terminal.
    """
    is_narrow = width < NARROW
    status = look.status
    parts: list[RenderableType] = [
        _progress(look),
        Text(),
        _figures(status, 1 if is_narrow else 2),
        Text(),
        _waits(status),
    ]
    if status.envs:
        parts += [Text(), _environments(status, is_narrow=is_narrow)]
    if status.inference_servers:
        parts += [Text(), _servers(status.inference_servers, status.policy_version)]
    parts += [_counts(status), _findings(look.findings), _events(look.events)]
    if look.problem:
        parts.insert(0, Text(look.problem + "\n", style="bold red"))
    return Panel(
        Group(*parts),
        title=f"[bold]atropos view[/]  {status.run_name or 'no run'}",
        subtitle=f"[dim]{source}   read only[/]",
        border_style="red" if look.problem else "cyan",
        padding=(1, 2),
    )


def _progress(look: Look) -> RenderableType:
    status = look.status
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column()
    row.add_column(ratio=1)
    row.add_column(justify="right")
    rate = ""
    if look.steps_per_s:
        left_s = (status.num_steps - status.step) / look.steps_per_s
        rate = f"{look.steps_per_s * 60:.1f} steps/min  ETA {duration(left_s)}"
    row.add_row(
        Text(f"step {status.step}/{status.num_steps}", style="bold"),
        ProgressBar(total=max(1, status.num_steps), completed=status.step),
        rate,
    )
    return row


def _figures(status: Status, columns: int) -> RenderableType:
    version = str(status.policy_version) if status.policy_version >= 0 else "none yet"
    figures = [
        ("queue", f"{status.queued_groups} groups, {status.queued_sequences} sequences, {_bytes(status.queued_bytes)}"),
        ("in flight", f"{status.tickets_outstanding} tickets, {status.sequences_in_flight} sequences"),
        ("policy version", version),
        ("staleness", f"at most {status.max_staleness} ({status.late_policy})"),
        ("batches", f"{status.formed_steps} formed, {status.committed_step} in a checkpoint"),
        ("admitted", f"{status.admitted_sequences} of {status.capacity_sequences} sequences"),
        ("batch size", str(status.batch_size)),
        ("accepted", f"{status.groups_accepted} groups, {status.groups_duplicate} repeated"),
    ]
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
    for row in range(0, len(figures), columns):
        table.add_row(*(cell for figure in figures[row : row + columns] for cell in figure))
    return table


def _waits(status: Status) -> RenderableType:
    """Who waits for whom."""
    lines: list[str] = []
    if status.trainer_waits_for is not None:
        lines.append(f"the trainer waits for {status.trainer_waits_for}")
    elif status.trainer_last_seen_s is not None:
        lines.append(f"the trainer was last heard {duration(status.trainer_last_seen_s)} ago")
    if status.run_id is not None and status.policy_version < 0:
        lines.append("the environments wait for the first policy version")
    elif 0 < status.capacity_sequences <= status.admitted_sequences:
        lines.append("the environments wait for the trainer: every place within the staleness bound is taken")
    return Text("\n".join(lines) or "nothing is known of a trainer", style="cyan")


def _environments(status: Status, *, is_narrow: bool) -> RenderableType:
    headings = ["environment", "state", "tickets", "queued", "accepted", "heard"]
    table = _table(*headings, *([] if is_narrow else ["group size", "trained tokens"]))
    total = sum(env.trained_tokens for env in status.envs)
    for env in status.envs:
        cells: list[RenderableType] = [
            env.name, _state(env), str(env.tickets), str(env.queued_groups), str(env.groups_accepted),
            f"{duration(env.last_seen_s)} ago", str(env.group_size),
            f"{env.trained_tokens} ({env.trained_tokens / max(1, total):.0%})",
        ]  # fmt: skip
        table.add_row(*cells[: len(table.columns)])
    return table


def _state(env: EnvStatus) -> Text:
    if not env.is_connected:
        return Text("left", style="dim")
    return Text("silent", style="bold red") if env.last_seen_s > SILENT_S else Text("live", style="green")


def _servers(entries: Sequence[InferenceServerStatus], published: int) -> RenderableType:
    # A column only where there is a problem: addresses need the room.
    has_problem = any(entry.server.problem for entry in entries)
    table = _table(
        "inference server", "role", "model", "policy version", "heard", *(["problem"] if has_problem else [])
    )
    for entry in entries:
        server, version = entry.server, entry.server.policy_version
        is_behind = server.role == "policy" and version is not None and version < published
        table.add_row(
            server.url, server.role, server.model_name,
            Text("-" if version is None else str(version), style="bold red" if is_behind else ""),
            f"{duration(entry.last_seen_s)} ago", *([Text(server.problem, style="bold red")] if has_problem else []),
        )  # fmt: skip
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim", expand=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", ratio=1 if index == 0 else None, min_width=8)
    return table


def _counts(status: Status) -> RenderableType:
    lines = [
        f"{title}: " + ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        for title, counts in (("retired groups", _nonzero(status.groups_retired)),
                              ("returned tickets", _nonzero(status.tickets_returned)))
        if counts
    ]  # fmt: skip
    return Text("".join(f"\n{line}" for line in lines))


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _findings(findings: Sequence[Finding]) -> RenderableType:
    text = Text()
    for finding in findings[:FINDINGS_SHOWN]:
        text.append(
            f"\n{finding.severity}: {finding.subject}: {finding.problem}", style=SEVERITY_STYLES[finding.severity]
        )
    if len(findings) > FINDINGS_SHOWN:
        text.append(f"\n{len(findings) - FINDINGS_SHOWN} more: atropos doctor", style="dim")
    return text


def _events(events: Sequence[Event]) -> RenderableType:
    return Text("".join(f"\n{event_line(event)}" for event in events[-EVENTS_SHOWN:]), style="dim")


def event_line(event: Event) -> str:
    """An event in one line."""
    return f"{time.strftime('%H:%M:%S', time.localtime(event.time_s))}  {event.text}"


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
