"""First program of the sandbox: gives up the network, most files and more than its share of resources, then becomes the runner.

A program of its own, because what it needs for that (ctypes) must be gone when foreign code runs. Standard library only.
Linux: user and network namespaces and Landlock, each where the kernel allows it. Elsewhere the limits alone.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterator

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System calls of Landlock; the numbers are the same on every architecture."""
RULE_PATH_BENEATH = 1

WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
FILE_RIGHTS_BY_ABI = ((1, (1 << 13) - 2), (2, 1 << 13), (3, TRUNCATE), (5, 1 << 15))
"""Rights over files that each version added; all but execution (bit 0), without which nothing could start."""
RIGHTS_OF_A_FILE = WRITE_FILE | READ_FILE | TRUNCATE
NET_RIGHTS = 0b11
"""TCP bind and connect, from version 4."""
SCOPES = 0b11
"""No signals to, and no abstract sockets of, processes outside; from version 6."""

SYSTEM_PATHS = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
    *("/dev/null", "/dev/zero", "/dev/urandom"),
)
FOREIGN_PACKAGES = ("site-packages", "dist-packages")


def leave_network(libc: ctypes.CDLL) -> bool:
    """Enter user, network and IPC namespaces of its own, without any interface; False where that is not allowed."""
    unshare = getattr(libc, "unshare", None)
    return unshare is not None and unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0


def readable_paths(runner: str) -> Iterator[str]:
    """What Python itself needs: the interpreter, the standard library without installed packages, shared libraries."""
    yield from (*SYSTEM_PATHS, runner, os.path.realpath(sys.executable))
    for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        yield from (entry.path for entry in os.scandir(folder) if entry.name not in FOREIGN_PACKAGES)
    yield from glob.glob(os.path.join(sys.base_prefix, "lib", "libpython*"))


def restrict_files(libc: ctypes.CDLL, folder: str, readable: Iterator[str]) -> int:
    """Write in the folder alone, read there and the readable paths; returns Landlock's version, 0 where there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    abi: int = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return 0
    rights = sum(bits for version, bits in FILE_RIGHTS_BY_ABI if version <= abi)
    fields = [rights, *([NET_RIGHTS] if abi >= 4 else []), *([SCOPES] if abi >= 6 else [])]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = checked(libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    for path in readable:
        allow(libc, ruleset, path, rights & (READ_FILE | READ_DIR))
    # Imports list the folder of the standard library; the packages below are named that way, and not readable.
    allow(libc, ruleset, sysconfig.get_path("stdlib"), rights & READ_DIR)
    allow(libc, ruleset, "/dev/null", rights & RIGHTS_OF_A_FILE)
    allow(libc, ruleset, folder, rights)
    checked(libc.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return abi


def allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Allow the rights at a path and below; nothing where it does not exist."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= RIGHTS_OF_A_FILE
    checked(libc.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", rights, place), 0))
    os.close(place)


def checked(result: int) -> int:
    """The result of a system call; raises OSError where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def set_limits(limits: dict[str, int]) -> None:
    """Hard limits, which only a privileged process could raise again."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        _, highest = resource.getrlimit(number)
        limit = value if highest == resource.RLIM_INFINITY else min(value, highest)
        # The first limit of CPU time ends in a signal of its own, the second in SIGKILL.
        resource.setrlimit(number, (limit, limit + 1 if name == "CPU" and limit == value else limit))


def main() -> None:
    """confine.py RUNNER LIMITS: become RUNNER, in the current folder."""
    runner, limits = sys.argv[1], json.loads(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        # Nobody would end it, should the environment be killed.
        checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    paths = sorted(set(readable_paths(runner)))
    has_namespaces = leave_network(libc)
    landlock = restrict_files(libc, os.getcwd(), iter(paths))
    set_limits(limits)
    facts = json.dumps({"namespaces": has_namespaces, "landlock": landlock, "readable": paths})
    python = os.path.realpath(sys.executable)
    os.execve(python, [python, "-I", "-S", "-B", runner, facts], dict(os.environ))


if __name__ == "__main__":
    main()
