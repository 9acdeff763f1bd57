"""How long `import atroposlib` takes in a fresh interpreter, and what it loads.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

PROGRAM = "import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
RUNS = 15


def main() -> None:
    for name in ("atroposlib", "atroposlib.client", "atroposlib.envs.base"):
        seconds = [
            float(
                subprocess.run(
                    [sys.executable, "-c", PROGRAM.format(name=name)], capture_output=True, check=True
                ).stdout
            )
            for _ in range(RUNS)
        ]
        print(f"import {name:22} median {statistics.median(seconds) * 1e3:7.1f} ms  max {max(seconds) * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
