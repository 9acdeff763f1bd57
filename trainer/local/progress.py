"""One live line while a local run is under way: what is waited for, then step, reward and staleness."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LiveLine(TrainerCallback):  # type: ignore[misc]
    """A callback of the trainer that draws a bar. Nothing is drawn outside of its block.

    Args:
        num_steps: of the run.
        is_shown: None: on a terminal and in a notebook.
    """

    def __init__(self, num_steps: int, *, is_shown: bool | None = None, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        shown = (console.is_terminal or console.is_jupyter) if is_shown is None else is_shown
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=console, disable=not shown)
        self._task = self._progress.add_task("starting", total=num_steps, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """What happens now."""
        self._progress.update(self._task, description=text)

    def tell(self, text: str) -> None:
        """A line that stays."""
        if not self._progress.disable:
            self._progress.console.print(text, highlight=False, markup=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures of a step."""
        figures = figures_of(logs or {})
        if figures:
            self._progress.update(self._task, completed=state.global_step, description="training", figures=figures)


def figures_of(logs: dict[str, Any]) -> str:
    """The figures of a step in a few words; empty where these are not those of a step."""
    if "reward/mean" not in logs:
        return ""
    shown = [f"reward {logs['reward/mean']:.3f}"]
    for key, text in (("staleness/mean", "staleness {:.1f}"), ("completion/mean", "{:.0f} tokens")):
        value = logs.get(key)
        if value is not None:
            shown.append(text.format(value))
    seconds = logs.get("time/step_s")
    return "  ".join([*shown, *([f"{seconds:.1f} s/step"] if seconds is not None else [])])
