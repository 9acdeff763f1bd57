"""Freed memory stays in the process, unless the user says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from trainer.step.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory(), end=" ")
np.ones(64 << 20, dtype=np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(64 << 20, dtype=np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


GIVEN_BACK = """
import psutil
import numpy as np
from trainer.step.allocator import GiveBackFreedMemory, keep_freed_memory
keep_freed_memory()
blocks = [np.ones(8 << 20, dtype=np.uint8) for _ in range(32)]
del blocks[::2]
kept = psutil.Process().memory_info().rss
GiveBackFreedMemory().on_save()
print((kept - psutil.Process().memory_info().rss) >> 20)
"""


def run(mode: str, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUN"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode],
        env={**environment, **variables}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_the_same_memory_serves_again() -> None:
    (without,) = run("leave")
    answer, kept = run("keep")

    assert answer == "True"
    assert int(kept) < int(without) / 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_what_lies_free_between_living_tensors_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, timeout=60, check=True)

    assert int(done.stdout) > 16 * 8 - 16


def test_the_users_own_settings_stay() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
