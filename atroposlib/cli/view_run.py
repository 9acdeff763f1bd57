"""view-run: a page of the groups that a rollout server received last."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from atroposlib.cli import run_viewer

DEFAULT_TOKENIZER = "NousResearch/DeepHermes-3-Llama-3-8B-Preview"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page; the exit status."""
    return run_viewer.main(argv, prog="view-run", tokenizer=DEFAULT_TOKENIZER, has_images=False)


if __name__ == "__main__":
    sys.exit(main())
