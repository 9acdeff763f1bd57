"""report.html and report.png: what a run did, readable without any server."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.errors import AtroposError
from atroposlib.launch.jsonl import Line, read_jsonl, surviving_history
from atroposlib.launch.run_folder import RunFolder
from atroposlib.launch.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, GREEN, AMBER, RED, VIOLET = "#2563eb", "#059669", "#d97706", "#dc2626", "#7c3aed"
MAX_SAMPLES = 6


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    unit: str
    draw: Callable[[Axes, Sequence[Line], Summary], None]


def write_report(folder: RunFolder, summary: Summary) -> Path:
    """Write report.html and report.png into the run folder; the path of the page.

    Raises:
        AtroposError: matplotlib is not installed.
    """
    steps = surviving_history(read_jsonl(folder.metrics))
    figure = _figure(summary, steps)
    png = folder.path / "report.png"
    figure.savefig(png, dpi=150)
    page = folder.path / "report.html"
    page.write_text(_page(folder, summary, _svg(figure)), encoding="utf-8")
    return page


def _figure(summary: Summary, steps: Sequence[Line]) -> Figure:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise AtroposError("the report needs matplotlib; install it with: pip install 'atroposlib[trainer]'") from None
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": FAINT,
        "axes.edgecolor": GRID,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.8,
        "svg.fonttype": "path",
    }
    spacing = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12, hspace=0.06, wspace=0.05)
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 9.2), facecolor="white", layout=spacing)
        figure.suptitle(_headline(summary), fontsize=14, fontweight="bold", x=0.012, ha="left")
        for axes, panel in zip(figure.subplots(3, 2).flat, PANELS, strict=True):
            axes.set_title(panel.title)
            axes.set_ylabel(panel.unit)
            panel.draw(axes, steps, summary)
    return figure


def _headline(summary: Summary) -> str:
    return (
        f"{summary.run_id}   held-out reward {_shown(summary.heldout_reward_before)} → "
        f"{_shown(summary.heldout_reward_after)}   {summary.steps} steps in {_minutes(summary.wall_s)}"
    )


def _curve(steps: Sequence[Line], key: str) -> tuple[list[int], list[float]]:
    points = [(int(line["step"]), float(line[key])) for line in steps if isinstance(line.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def _whole_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _no_data(axes: Axes, text: str = "not measured") -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT)
    axes.set_xticks([])
    axes.set_yticks([])


def _moving_average(values: Sequence[float], window: int = 5) -> list[float]:
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]


def _draw_reward(axes: Axes, steps: Sequence[Line], summary: Summary) -> None:
    x, y = _curve(steps, "reward/mean")
    if not x:
        return _no_data(axes, "no step was taken")
    axes.plot(x, y, color=GREEN, alpha=0.35, marker="o", markersize=3, label="each step")
    axes.plot(x, _moving_average(y), color=GREEN, label="mean of 5 steps")
    axes.legend(loc="lower right")
    return _whole_steps(axes)


def _draw_heldout(axes: Axes, steps: Sequence[Line], summary: Summary) -> None:
    bars = [
        (label, value, colour)
        for label, value, colour in (
            ("before", summary.heldout_reward_before, FAINT),
            ("after", summary.heldout_reward_after, GREEN),
        )
        if value is not None
    ]
    if not bars:
        return _no_data(axes, "not evaluated")
    labels, values, colours = zip(*bars, strict=True)
    drawn = axes.barh(labels, values, color=colours, height=0.55)
    axes.bar_label(drawn, fmt=" %.3f", fontsize=12, fontweight="bold", color=INK)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *values) * 1.15, max(1.0, *values) * 1.05)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelsize=11, length=0)
    return None


def _draw_length(axes: Axes, steps: Sequence[Line], summary: Summary) -> None:
    x, y = _curve(steps, "completion/mean")
    if not x:
        return _no_data(axes)
    axes.plot(x, y, color=BLUE, label="mean")
    longest_x, longest = _curve(steps, "completion/p95")
    if longest:
        axes.plot(longest_x, longest, color=BLUE, alpha=0.4, linestyle="--", label="95 % are shorter")
        axes.legend(loc="best")
    axes.set_ylim(bottom=0)
    return _whole_steps(axes)


def _draw_staleness(axes: Axes, steps: Sequence[Line], summary: Summary) -> None:
    x, worst = _curve(steps, "staleness/max")
    if not x:
        return _no_data(axes)
    axes.step(x, worst, where="mid", color=AMBER, label="stalest sequence")
    mean_x, mean = _curve(steps, "staleness/mean")
    axes.plot(mean_x, mean, color=AMBER, alpha=0.5, linestyle="--", label="mean")
    if summary.max_staleness_allowed is not None:
        axes.axhline(summary.max_staleness_allowed, color=RED, linewidth=1.2, label="allowed")
    axes.set_ylim(bottom=0, top=max(1, summary.max_staleness_allowed or 0, *worst) * 1.25)
    axes.legend(loc="best")
    return _whole_steps(axes)


def _draw_mismatch(axes: Axes, steps: Sequence[Line], summary: Summary) -> None:
    x, y = _curve(steps, "mismatch/kl_k3")
    if not x:
        return _no_data(axes)
    axes.plot(x, y, color=VIOLET)
    axes.set_ylim(bottom=0)
    return _whole_steps(axes)


def _draw_times(axes: Axes, steps: Sequence[Line], summary: Summary) -> None:
    parts = [
        ("time/wait_s", "waits for a batch", FAINT),
        ("time/train_s", "trains", BLUE),
        ("time/sync_s", "pushes weights", AMBER),
    ]
    rows = [line for line in steps if any(key in line for key, _, _ in parts)]
    if not rows:
        return _no_data(axes)
    x = [int(line["step"]) for line in rows]
    columns = [[float(line.get(key) or 0.0) for line in rows] for key, _, _ in parts]
    colours = [colour for _, _, colour in parts]
    axes.stackplot(x, columns, labels=[label for _, label, _ in parts], colors=colours, alpha=0.75, step="mid")
    axes.set_ylim(top=1.25 * max(sum(step) for step in zip(*columns, strict=True)) or 1.0)
    axes.legend(loc="upper right", ncols=len(parts))
    axes.margins(x=0)
    return _whole_steps(axes)


PANELS = (
    Panel("Reward in training", "mean reward", _draw_reward),
    Panel("Held-out reward", "", _draw_heldout),
    Panel("Completion length", "tokens", _draw_length),
    Panel("Staleness", "policy versions", _draw_staleness),
    Panel("Mismatch between trainer and engine", "KL, nats a token", _draw_mismatch),
    Panel("Where a step's time goes, trainer", "s", _draw_times),
)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue()).decode()


def _page(folder: RunFolder, summary: Summary, svg_base64: str) -> str:
    events = read_jsonl(folder.events)
    config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    return PAGE.format(
        title=html.escape(summary.run_id),
        style=STYLE,
        outcome=html.escape(summary.outcome),
        written=time.strftime("%Y-%m-%d %H:%M"),
        cards=_cards(summary),
        svg=svg_base64,
        rollouts=_rollouts(read_jsonl(folder.rollouts)),
        account=_account(summary),
        events=_events(events),
        config=html.escape(config),
    )


def _cards(summary: Summary) -> str:
    before, after = summary.heldout_reward_before, summary.heldout_reward_after
    gain = f"{after - before:+.3f}" if before is not None and after is not None else ""
    push = summary.weight_push_s_median
    allowed = summary.max_staleness_allowed
    cards = [
        ("held-out reward", f"{_shown(before)} → {_shown(after)}", gain),
        ("steps", str(summary.steps), f"in {_minutes(summary.wall_s)}"),
        ("sequences trained", f"{summary.sequences_trained:,}", f"{summary.tokens_trained:,} tokens"),
        ("lost / repeated", f"{summary.sequences_lost} / {summary.sequences_repeated}", "sequences, counted"),
        ("largest staleness", _shown(summary.max_staleness_seen), "" if allowed is None else f"allowed: {allowed}"),
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


def _rollouts(lines: Sequence[Line]) -> str:
    """A few from the whole run: the first, the last, and some between."""
    count = min(MAX_SAMPLES, len(lines))
    chosen = [lines[round(i * (len(lines) - 1) / max(1, count - 1))] for i in range(count)]
    if not chosen:
        return "<p class=note>No sample rollouts were kept.</p>"
    return "".join(
        "<article><header>"
        f"<span>step {html.escape(_shown(line.get('step')))}, policy version {html.escape(_shown(line.get('version')))}</span>"
        f"<span class={'good' if _is_good(line) else 'bad'}>reward {html.escape(_shown(line.get('reward')))}</span></header>"
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


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


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
