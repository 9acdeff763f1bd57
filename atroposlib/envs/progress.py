"""Progress of a long command: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

LINE_PERIOD_S = 10.0


class Advance(Protocol):
    """Tells that more is done."""

    def __call__(self, amount: int = 1) -> None:
        """So many more."""
        ...


@contextmanager
def progress(description: str, total: int | None, *, done: int = 0, is_shown: bool = True) -> Iterator[Advance]:
    """Show how far a command is, on stderr; call what this gives for each piece that is done.

    Args:
        total: pieces in all; None: not known.
        done: pieces that are done already.
        is_shown: False: show nothing.
    """
    if not is_shown:
        yield lambda amount=1: None
    elif sys.stderr.isatty():
        with _bar(description, total, done) as advance:
            yield advance
    else:
        lines = _Lines(sys.stderr, description, total, done)
        yield lines.advance
        lines.end()


@contextmanager
def _bar(description: str, total: int | None, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda amount=1: bar.advance(task, amount)


class _Lines:
    def __init__(self, stream: TextIO, description: str, total: int | None, done: int) -> None:
        self._stream, self._description, self._total, self._done = stream, description, total, done
        self._started = self._said = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if time.monotonic() - self._said >= LINE_PERIOD_S:
            self._say()

    def end(self) -> None:
        self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        of = "" if self._total is None else f"/{self._total}"
        print(
            f"{self._description}: {self._done}{of}, {self._said - self._started:.0f} s", file=self._stream, flush=True
        )
