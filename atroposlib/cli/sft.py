"""atropos-sft-gen: write the best rollouts of a running environment as examples for supervised fine-tuning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from atroposlib.cli import generation
from atroposlib.cli.group_texts import sft_lines

UNLIMITED_STEPS = 0

EXAMPLES = """A line is {"prefix", "completion", "score"}, or {"messages", "score"} with --save-messages.

examples:
  atropos-sft-gen sft.jsonl --tokenizer MODEL --group-size 8           then: python env.py serve --group_size 8
  atropos-sft-gen sft.jsonl --save-messages --append-to-previous --num-seqs-to-save 1000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; the exit status."""
    arguments = _parser().parse_args(argv)
    return generation.run(
        arguments,
        name="atropos-sft-gen",
        make_lines=lambda group: sft_lines(
            group,
            top_n=arguments.save_top_n_per_group,
            minimum_diff=arguments.minimum_score_diff_max_min,
            is_negative_allowed=arguments.allow_negative_scores,
        ),
        batch_size=arguments.group_size * arguments.tasks_per_step,
        num_steps=UNLIMITED_STEPS,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atropos-sft-gen",
        description="Takes batches from a rollout server, as a trainer does, and writes the best sequences of each group.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generation.add_arguments(parser, minimum_diff=0.0)
    parser.add_argument("--save-top-n-per-group", type=int, default=3, help="lines of a group, default: %(default)s")
    parser.add_argument("--tasks-per-step", type=int, default=64, help="groups of a batch, default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
