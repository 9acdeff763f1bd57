from __future__ import annotations

import subprocess
import sys


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    command = f"{sys.executable} -m atroposlib.cli.main up --config configs/demo.yaml --dry-run"

    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stderr == ""
