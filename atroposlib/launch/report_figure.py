"""The charts of a run's report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atroposlib.errors import AtroposError
from atroposlib.launch.alarm_periods import AlarmPeriod
from atroposlib.launch.jsonl import Line
from atroposlib.launch.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, GREEN, AMBER, RED, VIOLET = "#2563eb", "#059669", "#d97706", "#dc2626", "#7c3aed"
COLUMNS = 2


@dataclass(frozen=True)
class Run:
    """What the charts are drawn from."""

    summary: Summary
    steps: Sequence[Line]
    """The surviving history of metrics.jsonl."""
    alarms: Sequence[AlarmPeriod] = ()


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    unit: str
    draw: Callable[[Axes, Run], None]


def draw_figure(run: Run) -> Figure:
    """All charts on one sheet.

    Raises:
        AtroposError: matplotlib is not installed.
    """
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
        rows = -(-len(PANELS) // COLUMNS)
        figure = Figure(figsize=(13, 3.1 * rows), facecolor="white", layout=spacing)
        figure.suptitle(_headline(run.summary), fontsize=14, fontweight="bold", x=0.012, ha="left")
        places = list(figure.subplots(rows, COLUMNS).flat)
        for spare in places[len(PANELS) :]:
            spare.remove()
        for axes, panel in zip(places, PANELS, strict=False):
            axes.set_title(panel.title)
            axes.set_ylabel(panel.unit)
            panel.draw(axes, run)
    return figure


def _headline(summary: Summary) -> str:
    return (
        f"{summary.run_id}   held-out reward {shown(summary.heldout_reward_before)} → "
        f"{shown(summary.heldout_reward_after)}   {summary.steps} steps in {minutes(summary.wall_s)}"
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


def _draw_reward(axes: Axes, run: Run) -> None:
    x, y = _curve(run.steps, "reward/mean")
    if not x:
        return _no_data(axes, "no step was taken")
    axes.plot(x, y, color=GREEN, alpha=0.35, marker="o", markersize=3, label="each step")
    axes.plot(x, _moving_average(y), color=GREEN, label="mean of 5 steps")
    axes.legend(loc="lower right")
    return _whole_steps(axes)


def _draw_heldout(axes: Axes, run: Run) -> None:
    bars = [
        (label, value, colour)
        for label, value, colour in (
            ("before", run.summary.heldout_reward_before, FAINT),
            ("after", run.summary.heldout_reward_after, GREEN),
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


def _draw_length(axes: Axes, run: Run) -> None:
    x, y = _curve(run.steps, "completion/mean")
    if not x:
        return _no_data(axes)
    axes.plot(x, y, color=BLUE, label="mean")
    longest_x, longest = _curve(run.steps, "completion/p95")
    if longest:
        axes.plot(longest_x, longest, color=BLUE, alpha=0.4, linestyle="--", label="95 % are shorter")
        axes.legend(loc="best")
    axes.set_ylim(bottom=0)
    return _whole_steps(axes)


def _draw_staleness(axes: Axes, run: Run) -> None:
    x, worst = _curve(run.steps, "staleness/max")
    if not x:
        return _no_data(axes)
    axes.step(x, worst, where="mid", color=AMBER, label="stalest sequence")
    mean_x, mean = _curve(run.steps, "staleness/mean")
    axes.plot(mean_x, mean, color=AMBER, alpha=0.5, linestyle="--", label="mean")
    if run.summary.max_staleness_allowed is not None:
        axes.axhline(run.summary.max_staleness_allowed, color=RED, linewidth=1.2, label="allowed")
    axes.set_ylim(bottom=0, top=max(1, run.summary.max_staleness_allowed or 0, *worst) * 1.25)
    axes.legend(loc="best")
    return _whole_steps(axes)


def _draw_mismatch(axes: Axes, run: Run) -> None:
    x, y = _curve(run.steps, "mismatch/kl_k3")
    if not x:
        return _no_data(axes)
    axes.plot(x, y, color=VIOLET)
    axes.set_ylim(bottom=0)
    return _whole_steps(axes)


def _draw_times(axes: Axes, run: Run) -> None:
    parts = [
        ("time/wait_s", "waits for a batch", FAINT),
        ("time/train_s", "trains", BLUE),
        ("time/sync_s", "pushes weights", AMBER),
    ]
    rows = [line for line in run.steps if any(key in line for key, _, _ in parts)]
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


def _draw_weights(axes: Axes, run: Run) -> None:
    parts = [("ess", "effective share", GREEN), ("is/truncated_frac", "weights capped or 0", RED)]
    return _draw_curves(axes, run, parts, from_zero=True)


def _draw_loss(axes: Axes, run: Run) -> None:
    return _draw_curves(axes, run, [("loss/total", "loss", BLUE)])


def _draw_reference(axes: Axes, run: Run) -> None:
    parts = [("loss/kl", "from the reference", VIOLET), ("loss/distill", "from the teacher", AMBER)]
    return _draw_curves(axes, run, [part for part in parts if any(_curve(run.steps, part[0])[1])], "beta=0, no teacher")


def _draw_entropy(axes: Axes, run: Run) -> None:
    return _draw_curves(axes, run, [("entropy", "entropy", BLUE)], from_zero=True)


def _draw_grad_norm(axes: Axes, run: Run) -> None:
    return _draw_curves(axes, run, [("grad_norm", "before clipping", BLUE)], from_zero=True)


def _draw_speed(axes: Axes, run: Run) -> None:
    """Over the whole step, waiting included; and over its training alone."""
    parts = [("time/step_s", "of the whole step", GREEN), ("time/train_s", "while it trains", BLUE)]
    rows = [line for line in run.steps if line.get("tokens/step") and all(line.get(key) for key, _, _ in parts)]
    if not rows:
        return _no_data(axes)
    for seconds, label, colour in parts:
        speeds = [float(line["tokens/step"]) / float(line[seconds]) for line in rows]
        axes.plot([int(line["step"]) for line in rows], speeds, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    return _whole_steps(axes)


def _draw_alarms(axes: Axes, run: Run) -> None:
    """One bar from the start of each alarm to its end."""
    if not run.alarms:
        return _no_data(axes, "none")
    names = sorted({period.name for period in run.alarms}, reverse=True)
    last = max(int(line["step"]) for line in run.steps)
    for period in run.alarms:
        end = last + 1 if period.end_step is None else period.end_step
        axes.barh(names.index(period.name), end - period.first_step, left=period.first_step, color=RED, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, last + 1)
    return _whole_steps(axes)


def _draw_curves(
    axes: Axes,
    run: Run,
    parts: Sequence[tuple[str, str, str]],
    otherwise: str = "not measured",
    *,
    from_zero: bool = False,
) -> None:
    """Plain lines; each part is a metric, its label and its colour."""
    drawn = [(label, colour, *_curve(run.steps, key)) for key, label, colour in parts]
    drawn = [each for each in drawn if each[2]]
    if not drawn:
        return _no_data(axes, otherwise)
    for label, colour, x, y in drawn:
        axes.plot(x, y, color=colour, label=label)
    if len(drawn) > 1:
        axes.legend(loc="best")
    if from_zero:
        axes.set_ylim(bottom=0)
    return _whole_steps(axes)


PANELS = (
    Panel("Reward in training", "mean reward", _draw_reward),
    Panel("Held-out reward", "", _draw_heldout),
    Panel("Completion length", "tokens", _draw_length),
    Panel("Staleness", "policy versions", _draw_staleness),
    Panel("Mismatch between trainer and engine", "KL, nats a token", _draw_mismatch),
    Panel("Off-policy weights", "share of tokens", _draw_weights),
    Panel("Loss", "", _draw_loss),
    Panel("Gradient norm", "", _draw_grad_norm),
    Panel("Entropy", "nats a token", _draw_entropy),
    Panel("Distance from a reference or a teacher", "nats", _draw_reference),
    Panel("Trained tokens", "tokens/s", _draw_speed),
    Panel("Where a step's time goes, trainer", "s", _draw_times),
    Panel("Alarms", "", _draw_alarms),
)


def shown(value: object) -> str:
    """A figure as people read it."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def minutes(seconds: float) -> str:
    """A duration as people read it."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
