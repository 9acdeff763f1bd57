"""The load generator: senders and one trainer at work at once, with a bounded number of groups in between.

The window opens when some batches have come through and closes with a batch too, so that the rate is exact however
few batches a slow server manages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle, islice
from typing import NamedTuple

import psutil

from benchmarks.rollout_server.exchanges import Exchange, Poster, Taker
from benchmarks.rollout_server.ledger import AccountingError, Ledger

WARM_UP_BATCHES = 3
STALL_S = 120.0
"""No batch for so long is an error."""


@dataclass(frozen=True)
class LoadOptions:
    """How hard to push."""

    seconds: float = 8.0
    posters: int = 4
    queued_requests: int = 8
    """Requests whose groups may be in the server at once."""
    compare_every: int = 8


@dataclass(frozen=True)
class LoadResult:
    """What came through while the window was open, and the books at the end."""

    seconds: float
    groups: int
    server_cpu_s: float
    generator_cpu_s: float
    total_in: int
    total_out: int
    total_compared: int


class _Mark(NamedTuple):
    """Clocks at one moment."""

    wall_s: float
    server_cpu_s: float
    generator_cpu_s: float


class _Window:
    """Opens and closes at a batch; counts in between."""

    def __init__(self, seconds: float, server_cpu_s: Callable[[], float]) -> None:
        self.done = threading.Event()
        self.groups = 0
        self._seconds = seconds
        self._server_cpu_s = server_cpu_s
        self._batches = 0
        self._opened = self._closed = self._now()

    def on_batch(self, groups: int) -> None:
        self._batches += 1
        if self._batches == WARM_UP_BATCHES:
            self._opened = self._now()
        if self._batches <= WARM_UP_BATCHES or self.done.is_set():
            return
        self.groups += groups
        if time.monotonic() - self._opened.wall_s >= self._seconds:
            self._closed = self._now()
            self.done.set()

    def length(self) -> _Mark:
        """How far each clock went while it was open."""
        return _Mark(*(late - early for early, late in zip(self._opened, self._closed, strict=True)))

    def _now(self) -> _Mark:
        own = psutil.Process().cpu_times()
        return _Mark(time.monotonic(), self._server_cpu_s(), own.user + own.system)


class _Failures:
    """The first exception of any thread; it ends the run."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self.first: BaseException | None = None

    def guard(self, work: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.first = self.first or error
                self._stop.set()

        return guarded


def run_load(
    exchange: Exchange, ports: Sequence[int], options: LoadOptions, *, server_cpu_s: Callable[[], float] = lambda: 0.0
) -> LoadResult:
    """Push groups through a server until the window closes, then take out what is left.

    Args:
        ports: of one server, or of several that share a store: the senders spread over them, the trainer uses the first.

    Raises:
        AccountingError: a group was lost, doubled or altered.
        TimeoutError: no batch came for STALL_S.
    """
    ledger = Ledger(exchange, compare_every=options.compare_every)
    window = _Window(options.seconds, server_cpu_s)
    with ExitStack() as connections:
        taker = connections.enter_context(closing(exchange.open(ports[0])))
        posters = [
            connections.enter_context(closing(exchange.poster(port)))
            for port in islice(cycle(reversed(ports)), options.posters)
        ]
        _run_threads(exchange, posters, taker, ledger, window, threading.Semaphore(options.queued_requests))
        _drain(taker, ledger)
    length = window.length()
    return LoadResult(
        seconds=length.wall_s,
        groups=window.groups,
        server_cpu_s=length.server_cpu_s,
        generator_cpu_s=length.generator_cpu_s,
        total_in=ledger.groups_in,
        total_out=ledger.groups_out,
        total_compared=ledger.groups_compared,
    )


def _run_threads(
    exchange: Exchange,
    posters: Sequence[Poster],
    taker: Taker,
    ledger: Ledger,
    window: _Window,
    room: threading.Semaphore,
) -> None:
    failures = _Failures(window.done)
    senders = [
        threading.Thread(target=failures.guard(_sender(exchange, poster, ledger, room, window.done)))
        for poster in posters
    ]
    for sender in senders:
        sender.start()
    try:
        _take_until_closed(taker, ledger, room, window)
    finally:
        window.done.set()
        for sender in senders:
            sender.join(STALL_S)
    if failures.first is not None:
        raise failures.first


def _sender(
    exchange: Exchange, poster: Poster, ledger: Ledger, room: threading.Semaphore, done: threading.Event
) -> Callable[[], None]:
    body = exchange.payload.body()

    def send_until_done() -> None:
        while not done.is_set():
            if not room.acquire(timeout=0.1):
                continue
            exchange.payload.stamp(body, ledger.reserve())
            poster.post(body)

    return send_until_done


def _take_until_closed(taker: Taker, ledger: Ledger, room: threading.Semaphore, window: _Window) -> None:
    last = time.monotonic()
    while not window.done.is_set():
        batch = taker.take()
        if batch is not None:
            window.on_batch(ledger.settle(batch))
            room.release()
            last = time.monotonic()
        elif time.monotonic() - last > STALL_S:
            raise TimeoutError(f"no batch for {STALL_S:.0f} s; {ledger.groups_inside} groups are in the server")


def _drain(taker: Taker, ledger: Ledger) -> None:
    end = time.monotonic() + STALL_S
    while ledger.groups_inside:
        batch = taker.take()
        if batch is not None:
            ledger.settle(batch)
        elif time.monotonic() > end:
            raise AccountingError(f"{ledger.groups_inside} groups never came back")
