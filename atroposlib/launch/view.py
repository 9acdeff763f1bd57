"""Shows a running run: one live view in a terminal, plain lines everywhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atroposlib.launch.processes import State
from atroposlib.launch.telemetry import Telemetry

BARS = "▁▂▃▄▅▆▇█"
STATE_STYLES: dict[State, str] = {
    "starting": "yellow",
    "running": "green",
    "restarting": "bold red",
    "finished": "bright_black",
    "stopping": "yellow",
    "stopped": "bright_black",
    "failed": "bold red",
}
# Terminals of fewer columns get a narrower layout.
NARROW = 104
# Events that are news to a reader of plain lines; starts and orderly ends are in the event log.
NEWS = frozenset({"phase", "ready", "died", "failed", "finished", "restart_ordered", "evaluated", "warning"})


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as a line of bars, from their lowest to their highest."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return BARS[len(BARS) // 2] * len(shown)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in shown)


def duration(seconds: float) -> str:
    """45 s, 3:05 min, 1:02:03 h."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"


def number(value: object, digits: int = 3, *, unit: str = "") -> str:
    """A figure, or a dash for what is not known yet."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    text = str(value) if isinstance(value, int) else f"{value:.{digits}f}"
    return f"{text} {unit}".rstrip()


def render(telemetry: Telemetry, *, width: int = 100) -> RenderableType:
    """The whole view, from one look at the state."""
    return Panel(
        Group(
            _progress(telemetry),
            Text(),
            _figures(telemetry, width),
            Text(),
            _processes(telemetry, width),
            _news(telemetry),
        ),
        title=f"[bold]atropos up[/]  {telemetry.folder.run_id}",
        subtitle=f"[dim]{telemetry.folder.path}   Ctrl-C ends every process[/]",
        border_style="cyan",
        padding=(1, 2),
    )


def _progress(telemetry: Telemetry) -> RenderableType:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column()
    row.add_column(ratio=1)
    row.add_column(justify="right")
    elapsed = duration(time.time() - telemetry.started_at)
    eta = f"  ETA {duration(telemetry.eta_s)}" if telemetry.eta_s is not None else ""
    row.add_row(
        Text(telemetry.phase, style="bold"),
        ProgressBar(total=max(1, telemetry.num_steps), completed=telemetry.step),
        Text(f"step {telemetry.step}/{telemetry.num_steps}  {elapsed}{eta}"),
    )
    return row


def _figures(telemetry: Telemetry, width: int) -> RenderableType:
    latest, status = telemetry.latest, telemetry.status
    rewards = telemetry.series("reward/mean")
    staleness_max = max(telemetry.series("staleness/max"), default=None)
    version = status.policy_version if status and status.policy_version >= 0 else None
    figures: list[tuple[str, RenderableType]] = [
        ("reward", Text(number(rewards[-1] if rewards else None), style="bold green")),
        ("sampling", number(telemetry.sampling_tokens_per_s, 0, unit="tok/s")),
        ("staleness", f"{number(latest.get('staleness/mean'), 2)} (max {number(staleness_max, 0)})"),
        ("policy version", number(version)),
        ("length", number(latest.get("completion/mean"), 1, unit="tok")),
        ("training", number(telemetry.training_tokens_per_s, 0, unit="tok/s")),
        ("mismatch KL", number(latest.get("mismatch/kl_k3"), 5)),
        ("queue", f"{status.queued_sequences} sequences" if status else "-"),
    ]
    columns = 4 if width >= NARROW else 2
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
    for row in range(0, len(figures), columns):
        table.add_row(*(cell for figure in figures[row : row + columns] for cell in figure))
    return Group(table, Text(), _reward_curve(rewards, width))


def _reward_curve(rewards: Sequence[float], width: int) -> RenderableType:
    if not rewards:
        return Text("reward curve  after the first step", style="dim")
    shown = rewards[-max(10, width - 44) :]
    return Text.assemble(
        ("reward curve  ", "dim"),
        (sparkline(shown, len(shown)), "green"),
        (f"  {number(min(shown), 2)} to {number(max(shown), 2)}", "dim"),
    )


def _processes(telemetry: Telemetry, width: int) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim", expand=True)
    headings = ["process", "state", "restarts", "pid"] if width >= NARROW else ["process", "state", "restarts"]
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    table.add_column("doing", ratio=1, no_wrap=True, overflow="ellipsis")
    for child in telemetry.children.values():
        cells: list[RenderableType] = [
            child.name,
            Text(child.state, style=STATE_STYLES[child.state]),
            Text(str(child.restarts), style="bold red" if child.restarts else "dim"),
            Text(str(child.pid or ""), style="dim"),
        ]
        table.add_row(*cells[: len(headings)], telemetry.waits_for(child))
    return table


def _news(telemetry: Telemetry, lines: int = 4) -> RenderableType:
    news = [event for event in telemetry.events if event["event"] in NEWS][-lines:]
    return Text(
        "".join(f"\n{_clock(event['time'])}  {event['text']}" for event in news), style="dim", overflow="ellipsis"
    )


def _clock(unix_time: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_time))


class PlainView:
    """Prints what is new since the last call: events, and one line a step."""

    def __init__(self, telemetry: Telemetry, console: Console) -> None:
        self.telemetry = telemetry
        self.console = console
        self._events_shown = 0
        self._step_shown = -1
        self._waits_shown: dict[str, str] = {}
        self._quiet_since = time.monotonic()

    def update(self) -> None:
        """Print the news, if any; after a silent minute what everybody waits for."""
        telemetry = self.telemetry
        for event in telemetry.events[self._events_shown :]:
            if event["event"] in NEWS:
                self._print(float(event["time"]), str(event["text"]))
        self._events_shown = len(telemetry.events)
        latest = telemetry.latest
        is_of_this_session = float(latest.get("time", 0.0)) >= telemetry.started_at
        if is_of_this_session and int(latest["step"]) != self._step_shown:
            self._step_shown = int(latest["step"])
            self._print(float(latest.get("time", time.time())), step_line(telemetry))
        if time.monotonic() - self._quiet_since > 60:
            waits = {name: telemetry.waits_for(child) for name, child in telemetry.children.items()}
            self._print(time.time(), "; ".join(f"{name}: {wait}" for name, wait in waits.items() if wait) or "waiting")

    def _print(self, at: float, text: str) -> None:
        self._quiet_since = time.monotonic()
        self.console.print(f"{_clock(at)}  {text}", markup=False, highlight=False, soft_wrap=True)


def step_line(telemetry: Telemetry) -> str:
    """The latest step in one line."""
    latest = telemetry.latest
    eta = f"  eta {duration(telemetry.eta_s)}" if telemetry.eta_s is not None else ""
    return (
        f"step {telemetry.step}/{telemetry.num_steps}"
        f"  reward {number(latest.get('reward/mean'))}"
        f"  length {number(latest.get('completion/mean'), 1)}"
        f"  staleness {number(latest.get('staleness/mean'), 2)} (max {number(latest.get('staleness/max'), 0)})"
        f"  mismatch KL {number(latest.get('mismatch/kl_k3'), 5)}"
        f"  sampling {number(telemetry.sampling_tokens_per_s, 0)} tok/s"
        f"  training {number(telemetry.training_tokens_per_s, 0)} tok/s"
        f"  {number(latest.get('time/step_s'), 1)} s{eta}"
    )


async def show(telemetry: Telemetry, console: Console, *, is_live: bool) -> None:
    """Show the run until cancelled, then once more as it stands."""
    if is_live:
        with Live(render(telemetry, width=console.width), console=console, refresh_per_second=4) as live:
            try:
                while True:
                    await asyncio.sleep(0.25)
                    live.update(render(telemetry, width=console.width))
            finally:
                live.update(render(telemetry, width=console.width), refresh=True)
    plain = PlainView(telemetry, console)
    try:
        while True:
            plain.update()
            await asyncio.sleep(0.5)
    finally:
        plain.update()
