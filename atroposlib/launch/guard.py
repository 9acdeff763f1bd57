"""Guardian of one process: ends it, and everything it started, on order or when `atropos up` is gone.

Run as a script between `atropos up` and each of its children::

    python guard.py GRACE_S COMMAND [ARG ...]

stdin is the lifeline: "stop" or its end (the kernel closes it however `atropos up` died) asks the process to end, "kill"
does not ask. stdout tells ``started PID`` and ``exited STATUS`` (negative: the signal). The process writes to stderr.
On Linux the guardian adopts the orphans of its process, so helpers that left the process group are found as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# Helpers that outlive their process get this long to notice it by themselves.
SURVIVOR_GRACE_S = 2.0


class Guard:
    """One process and what descends from it."""

    def __init__(self, command: list[str], *, grace_s: float) -> None:
        self.command = command
        self.grace_s = grace_s
        self.status: int | None = None
        self._told_to_stop = False
        self._told_to_kill = False
        self._lifeline_is_cut = False
        self._wakeup_r, wakeup_w = os.pipe()
        for fd in (self._wakeup_r, wakeup_w):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wakeup_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for name in ("SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), self._on_stop_signal)

    def _on_stop_signal(self, *_: object) -> None:
        self._told_to_stop = True

    def run(self) -> int:
        """Start the process, wait for its end or for the order to end it; its status."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            print(f"error: cannot start {self.command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            return 127
        self.pid = process.pid
        _tell(f"started {self.pid}")
        while self.status is None and not (self._told_to_stop or self._told_to_kill):
            self._wait(None)
        if self.status is None:
            self._end_process()
        self._end_survivors()
        process.returncode = self.status  # reaped here, not by Popen
        return -signal.SIGKILL if self.status is None else self.status

    def _wait(self, timeout_s: float | None) -> None:
        """Sleep until an order, a dead child or the time-out; take note of what happened."""
        watched = [self._wakeup_r] if self._lifeline_is_cut else [self._wakeup_r, 0]
        readable, _, _ = select.select(watched, [], [], timeout_s)
        if self._wakeup_r in readable:
            os.read(self._wakeup_r, 4096)
        if 0 in readable:
            order = os.read(0, 4096)
            self._told_to_kill = self._told_to_kill or b"kill" in order
            self._told_to_stop = True
            self._lifeline_is_cut = not order
        self._reap()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.pid:
                    self.status = os.waitstatus_to_exitcode(status)

    def _end_process(self) -> None:
        self._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        while self.status is None and not self._told_to_kill and time.monotonic() < deadline:
            self._wait(deadline - time.monotonic())
        if self.status is None:
            self._signal_group(signal.SIGKILL)
            deadline = time.monotonic() + self.grace_s
            while self.status is None and time.monotonic() < deadline:
                self._wait(0.2)

    def _end_survivors(self) -> None:
        """No helper of a dead process may keep its port, its memory or its cores."""
        deadline = time.monotonic() + SURVIVOR_GRACE_S
        survivors = _descendants()
        for survivor in survivors:
            with contextlib.suppress(psutil.Error):
                survivor.terminate()
        while survivors and not self._told_to_kill and time.monotonic() < deadline:
            self._wait(0.05)
            survivors = _descendants()
        deadline = time.monotonic() + self.grace_s
        while survivors and time.monotonic() < deadline:
            for survivor in survivors:
                with contextlib.suppress(psutil.Error):
                    survivor.kill()
            self._wait(0.05)
            survivors = _descendants()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _descendants() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if _is_alive(child)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    # Runs between fork and exec of a process that has one thread, so it is safe to call into libc.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _tell(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{line}\n".encode())


def main(argv: list[str]) -> int:
    """Guard the command in argv; the guardian's own status only says that it did its work."""
    status = Guard(argv[1:], grace_s=float(argv[0])).run()
    _tell(f"exited {status}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
