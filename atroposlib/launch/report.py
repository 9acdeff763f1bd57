"""report.html and report.png: what a run did, readable without any server."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.launch.alarm_periods import AlarmPeriod, alarm_periods
from atroposlib.launch.jsonl import Line, read_jsonl, surviving_history
from atroposlib.launch.report_figure import Run, draw_figure, minutes, shown
from atroposlib.launch.run_folder import RunFolder
from atroposlib.launch.summary import Summary, gain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SAMPLES = 6


def write_report(folder: RunFolder, summary: Summary) -> Path:
    """Write report.html and report.png into the run folder; the path of the page.

    Raises:
        AtroposError: matplotlib is not installed.
    """
    steps = surviving_history(read_jsonl(folder.metrics))
    alarms = alarm_periods(steps, read_jsonl(folder.path / "alarms.jsonl"))
    figure = draw_figure(Run(summary, steps, alarms))
    png = folder.path / "report.png"
    figure.savefig(png, dpi=150)
    page = folder.path / "report.html"
    page.write_text(_page(folder, summary, _svg(figure), alarms), encoding="utf-8")
    return page


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue()).decode()


def _page(folder: RunFolder, summary: Summary, svg_base64: str, alarms: Sequence[AlarmPeriod]) -> str:
    events = read_jsonl(folder.events)
    config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    return PAGE.format(
        title=html.escape(summary.run_id),
        style=STYLE,
        outcome=html.escape(summary.outcome),
        written=time.strftime("%Y-%m-%d %H:%M"),
        cards=_cards(summary),
        svg=svg_base64,
        alarms=_alarms(alarms),
        rollouts=_rollouts(read_jsonl(folder.rollouts)),
        account=_account(summary),
        events=_events(events),
        config=html.escape(config),
    )


def _cards(summary: Summary) -> str:
    push = summary.weight_push_s_median
    allowed = summary.max_staleness_allowed
    cards = [
        (
            "held-out reward",
            f"{shown(summary.heldout_reward_before)} → {shown(summary.heldout_reward_after)}",
            gain(summary),
        ),
        ("steps", str(summary.steps), f"in {minutes(summary.wall_s)}"),
        ("sequences trained", f"{summary.sequences_trained:,}", f"{summary.tokens_trained:,} tokens"),
        ("lost / repeated", f"{summary.sequences_lost} / {summary.sequences_repeated}", "sequences, counted"),
        ("largest staleness", shown(summary.max_staleness_seen), "" if allowed is None else f"allowed: {allowed}"),
        ("weight push", "-" if push is None else f"{push:.2f} s", "median"),
    ]
    return "".join(
        f"<div class=card><div class=label>{label}</div><div class=figure>{html.escape(figure)}</div>"
        f"<div class=note>{html.escape(note)}</div></div>"
        for label, figure, note in cards
    )


def _account(summary: Summary) -> str:
    retired = ", ".join(f"{count} {reason}" for reason, count in summary.sequences_retired.items())
    rows: list[tuple[str, Any]] = [
        ("trained", summary.sequences_trained),
        ("lost", summary.sequences_lost),
        ("trained twice", summary.sequences_repeated),
        ("left over when the run ended", summary.sequences_waiting),
        ("retired with a reason", retired or 0),
        ("trained, delivery not noted by the environment", summary.sequences_unledgered),
    ]
    rows += [(f"restarts of {name}", count) for name, count in summary.restarts.items() if count]
    if (both := summary.overlap) is not None and both.sampling_busy_s is not None:
        rows += [
            ("wall time of the training phase", f"{both.wall_s:.0f} s"),
            ("seconds with sampling in flight", f"{both.sampling_busy_s:.0f} s"),
            ("seconds of training and weight push", f"{both.training_busy_s:.0f} s"),
        ]
    return "".join(f"<tr><td>{html.escape(str(a))}<td class=right>{html.escape(str(b))}" for a, b in rows)


def _alarms(alarms: Sequence[AlarmPeriod]) -> str:
    if not alarms:
        return "<p class=note>None.</p>"
    rows = "".join(
        f"<tr><td>{html.escape(alarm.name)}<td class=right>{_steps(alarm)}<td>{html.escape(alarm.text)}"
        for alarm in alarms
    )
    return f"<section><table>{rows}</table></section>"


def _steps(alarm: AlarmPeriod) -> str:
    end = "end" if alarm.end_step is None else str(alarm.end_step - 1)
    return f"{alarm.first_step} to {end}"


def _rollouts(lines: Sequence[Line]) -> str:
    """A few from the whole run: the first, the last, and some between."""
    count = min(MAX_SAMPLES, len(lines))
    chosen = [lines[round(i * (len(lines) - 1) / max(1, count - 1))] for i in range(count)]
    if not chosen:
        return "<p class=note>No sample rollouts were kept.</p>"
    return "".join(
        "<article><header>"
        f"<span>step {html.escape(shown(line.get('step')))}, policy version {html.escape(shown(line.get('version')))}</span>"
        f"<span class={'good' if _is_good(line) else 'bad'}>reward {html.escape(shown(line.get('reward')))}</span></header>"
        f"<pre class=prompt>{html.escape(str(line.get('prompt', '')))}</pre>"
        f"<pre>{html.escape(str(line.get('completion', '')))}</pre></article>"
        for line in chosen
    )


def _is_good(line: Line) -> bool:
    reward = line.get("reward")
    return isinstance(reward, int | float) and reward > 0


def _events(events: Sequence[Line]) -> str:
    told = ("phase", "ready", "died", "failed", "restart_ordered", "evaluated", "warning", "session_started")
    rows = [event for event in events if event.get("event") in told]
    return "".join(
        f"<tr class={html.escape(str(event['event']))}><td class=note>"
        f"{time.strftime('%H:%M:%S', time.localtime(float(event['time'])))}<td>{html.escape(str(event['text']))}"
        for event in rows
    )


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f3f4f6; color: #1f2937; font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 40px 0 12px; font-size: 18px; }
.note { color: #6b7280; font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 24px 0; }
.card, section, article, details { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; padding: 14px 16px; }
.label { color: #6b7280; font-size: 13px; }
.figure { font-size: 21px; font-weight: 650; font-variant-numeric: tabular-nums; }
img { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; }
td { padding: 4px 12px 4px 0; border-bottom: 1px solid #f3f4f6; vertical-align: top; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
tr.died td, tr.failed td, tr.warning td { color: #b91c1c; }
article { margin-bottom: 12px; }
article header { display: flex; justify-content: space-between; color: #6b7280; font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, monospace; margin: 8px 0 0; }
pre.prompt { color: #6b7280; }
.good { color: #059669; font-weight: 600; }
.bad { color: #b91c1c; font-weight: 600; }
summary { cursor: pointer; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<h1>{title}</h1>
<div class="note">{outcome}; report written {written}</div>
<div class="cards">{cards}</div>
<section><img alt="curves of the run" src="data:image/svg+xml;base64,{svg}"></section>
<h2>Alarms</h2>
{alarms}
<h2>Sample rollouts</h2>
{rollouts}
<h2>What became of every sequence</h2>
<section><table>{account}</table></section>
<h2>Events</h2>
<details><summary>starts, restarts, phases</summary><table>{events}</table></details>
<h2>Config</h2>
<details><summary>resolved config</summary><pre>{config}</pre></details>
</main></body></html>
"""
