"""Second program of the sandbox: defines the policy's function, calls it, and reports a line of JSON for each call.

It knows the arguments and never the expected results, so there is nothing here that a solution could gain by lying.
Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "gc.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.system", "os.kill", "signal.pthread_kill", "os.putenv", "shutil.", "cpython.run_"),
)
"""Beginnings of audit events: https://docs.python.org/3/library/audit_events.html"""
FORBIDDEN_MODULES = frozenset({"ctypes", "_ctypes", "_posixsubprocess", "_signal"})
SILENT_SIGNALS = ("raise_signal", "pidfd_send_signal")
"""Functions of the signal module that raise no audit event."""
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.ch",
    "os.utime",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(folder: str, readable: Sequence[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses by name what the kernel would refuse too, and more where the kernel cannot."""

    def is_below(path: str, roots: Sequence[str]) -> bool:
        real = os.path.realpath(path)
        return any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            roots = [folder, "/dev/null"] if (args[2] or 0) & WRITING else [folder, *readable]
            is_allowed = is_below(os.fsdecode(args[0]), roots)
        elif event == "import":
            is_allowed = args[0] not in FORBIDDEN_MODULES
        elif event.startswith(CHANGES):
            is_allowed = all(is_below(os.fsdecode(arg), [folder]) for arg in args if isinstance(arg, (str, bytes)))
        else:
            is_allowed = not event.startswith(FORBIDDEN)
        if not is_allowed:
            raise PermissionError(f"the sandbox does not allow {event} {args[:1]}")

    return hook


def remove_silent_signals() -> None:
    """Take away what the hook would not see; importing `_signal` anew would bring it back, and is forbidden."""
    for module in (signal, sys.modules.pop("_signal")):
        for name in SILENT_SIGNALS:
            if hasattr(module, name):
                delattr(module, name)


def load(code: str, name: str) -> Callable[..., Any]:
    """The function that the code defines."""
    namespace: dict[str, Any] = {"__name__": "solution"}
    exec(compile(code, "solution.py", "exec"), namespace)
    function = namespace.get(name)
    if not callable(function):
        raise NameError(f"the code defines no function {name!r}")
    return function  # type: ignore[no-any-return]


def described(error: BaseException) -> str:
    """The error in a line; its own text may be as broken as the code that made it."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__


def outcome(function: Callable[..., Any], args: Sequence[Any]) -> str:
    """What one call gives, as JSON."""
    try:
        return json.dumps({"value": function(*args)})
    # A solution may raise anything, SystemExit too.
    except BaseException as error:
        return json.dumps({"error": described(error)})


def main() -> None:
    """runner.py FACTS: read a request from stdin, report on what was stdout."""
    facts = json.loads(sys.argv[1])
    request = json.load(sys.stdin.buffer)
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the solution prints must not mix with the report.
    os.dup2(2, 1)
    report.write(json.dumps({"namespaces": facts["namespaces"], "landlock": facts["landlock"]}) + "\n")
    report.flush()
    remove_silent_signals()
    sys.addaudithook(guard(os.path.realpath(os.getcwd()), [os.path.realpath(path) for path in facts["readable"]]))
    try:
        function = load(request["code"], request["function"])
    except BaseException as error:
        report.write(json.dumps({"failure": described(error)}) + "\n")
    else:
        for args in request["calls"]:
            report.write(outcome(function, args) + "\n")
            report.flush()
    report.flush()
    # At once: threads and exit handlers of the solution have nothing more to say.
    os._exit(0)


if __name__ == "__main__":
    main()
