"""What atropos-sft-gen and atropos-dpo-gen share: options, the file, the loop over groups."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TextIO

from atroposlib.cli import connection
from atroposlib.cli.group_texts import Candidate, candidates
from atroposlib.cli.old_routes import OldRoutes, OwnRun, groups_of
from atroposlib.envs.progress import progress
from atroposlib.errors import AtroposError

DEFAULT_TOKENIZER = "NousResearch/DeepHermes-3-Llama-3-8B-Preview"
POLL_S = 0.5
INTERRUPTED_STATUS = 130

MakeLines = Callable[[Sequence[Candidate]], list[dict[str, Any]]]


class FileExistsAlreadyError(AtroposError):
    """The file to write is there already; the server was not touched."""

    code: ClassVar[str] = "file_exists"
    hint = "add to it with --append-to-previous, or name another"


def add_arguments(parser: argparse.ArgumentParser, *, minimum_diff: float) -> None:
    """Add the options of both generators."""
    parser.add_argument("filepath", type=Path, help="JSONL file to write")
    parser.add_argument("--api-url", default="http://localhost:8000", help="rollout server, default: %(default)s")
    parser.add_argument("--group-size", type=int, default=2, help="sequences of a group, default: %(default)s")
    parser.add_argument("--max-token-len", type=int, default=2048, help="longest sequence, default: %(default)s")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, help="of the model, default: %(default)s")
    parser.add_argument("--save-messages", action="store_true", help="write messages instead of texts")
    parser.add_argument("--num-seqs-to-save", type=int, default=100, help="lines to write, default: %(default)s")
    parser.add_argument("--allow-negative-scores", action="store_true", help="keep scores of 0 and below")
    parser.add_argument(
        "--minimum-score-diff-max-min", type=float, default=minimum_diff, metavar="DIFF",
        help="distance that a kept score has to the worse ones, default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--append-to-previous", action="store_true", help="add to a file that exists")
    parser.add_argument("--force", action="store_true", help="end the run of a trainer that is registered")
    parser.add_argument(
        "--patience", type=float, default=1800.0, metavar="SECONDS",
        help="give up when no batch comes for so long, default: %(default)s",
    )  # fmt: skip
    connection.add_arguments(parser)


def run(arguments: argparse.Namespace, *, name: str, make_lines: MakeLines, batch_size: int, num_steps: int) -> int:
    """Write lines until there are enough; the exit status. What is written stays, whatever ends the run."""
    try:
        with _output(arguments.filepath, is_appended=arguments.append_to_previous) as file:
            written = _generate(arguments, file, name, make_lines, batch_size, num_steps)
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        if hint := getattr(error, "hint", ""):
            print(f"hint: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    print(f"{written} lines written to {arguments.filepath}")
    return 0


def _generate(
    arguments: argparse.Namespace, file: TextIO, name: str, make_lines: MakeLines, batch_size: int, num_steps: int
) -> int:
    tokenizer = None if arguments.save_messages else _load_tokenizer(arguments.tokenizer)
    wanted: int = arguments.num_seqs_to_save
    written = 0
    with _own_run(arguments, name, batch_size, num_steps) as groups, progress("lines", wanted) as advance:
        while written < wanted:
            for line in make_lines(candidates(next(groups), tokenizer))[: wanted - written]:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                written += 1
                advance()
    return written


@contextmanager
def _own_run(
    arguments: argparse.Namespace, name: str, batch_size: int, num_steps: int
) -> Iterator[Iterator[dict[str, Any]]]:
    with OldRoutes(arguments.api_url, arguments.token) as routes:
        run = OwnRun(routes, name)
        run.open(
            batch_size=batch_size,
            max_token_len=arguments.max_token_len,
            num_steps=num_steps,
            is_forced=arguments.force,
        )
        try:
            yield groups_of(run, patience_s=arguments.patience, poll_s=POLL_S, clock=time.monotonic, sleep=time.sleep)
        finally:
            run.close()


@contextmanager
def _output(path: Path, *, is_appended: bool) -> Iterator[TextIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("a" if is_appended else "x", encoding="utf-8")
    except FileExistsError as error:
        raise FileExistsAlreadyError(f"{path} exists already") from error
    try:
        with file:
            yield file
    finally:
        # The next try must not be refused because of this one.
        if not is_appended and path.stat().st_size == 0:
            path.unlink()


def _load_tokenizer(name: str) -> Any:
    # Imported here: --help should not wait for it.
    from atroposlib.envs.tokenizers import load_tokenizer

    return load_tokenizer(name)
