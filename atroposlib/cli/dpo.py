"""atropos-dpo-gen: write pairs of better and worse rollouts of a running environment as examples for preference training."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from atroposlib.cli import generation
from atroposlib.cli.group_texts import dpo_lines

GROUPS_PER_BATCH = 8

EXAMPLES = """A line is {"prefix", "pos", "score", "neg"}; with --save-messages {"pos", "score", "neg"}, both sides as messages.

examples:
  atropos-dpo-gen dpo.jsonl --tokenizer MODEL --group-size 8           then: python env.py serve --group_size 8
  atropos-dpo-gen dpo.jsonl --save-messages --minimum-score-diff-max-min 0.9
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; the exit status."""
    arguments = _parser().parse_args(argv)
    draw = random.Random(arguments.seed)
    return generation.run(
        arguments,
        name="atropos-dpo-gen",
        make_lines=lambda group: dpo_lines(
            group,
            n_pairs=arguments.save_n_pairs_per_group,
            minimum_diff=arguments.minimum_score_diff_max_min,
            is_negative_allowed=arguments.allow_negative_scores,
            draw=draw,
        ),
        batch_size=arguments.group_size * GROUPS_PER_BATCH,
        num_steps=2 * arguments.num_seqs_to_save,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atropos-dpo-gen",
        description="Takes batches from a rollout server, as a trainer does, and writes pairs of sequences of each group.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generation.add_arguments(parser, minimum_diff=0.5)
    parser.add_argument("--save-n-pairs-per-group", type=int, default=3, help="lines of a group, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the worse side, default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
