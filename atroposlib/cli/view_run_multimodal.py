"""view-run-multimodal: as view-run, with the first image of each group."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from atroposlib.cli import run_viewer

DEFAULT_TOKENIZER = "Qwen/Qwen2-VL-2B-Instruct"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page; the exit status."""
    return run_viewer.main(argv, prog="view-run-multimodal", tokenizer=DEFAULT_TOKENIZER, has_images=True)


if __name__ == "__main__":
    sys.exit(main())
