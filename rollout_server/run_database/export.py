"""atropos export: the groups of a recorded run as Parquet or JSON lines, for notebooks, SFT and audits."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from atroposlib.errors import ConfigError
from atroposlib.wire.columns import Group, decode_groups
from atroposlib.wire.models import GroupRecord
from rollout_server.run_database.export_json import AtroposWriter, JsonLinesWriter
from rollout_server.run_database.export_parquet import ParquetWriter
from rollout_server.run_database.recorded import STATES, open_recorded
from rollout_server.stores.run_reader import GroupState, RunReader

FORMATS = ("parquet", "jsonl", "atropos")

EXAMPLES = """A run can be exported while its server writes it. Payload that retention has deleted is gone; the last line says how much.

examples:
  atropos export data/run1 --out run1.parquet                       what was trained on, a row a sequence
  atropos export data/run1 --format jsonl --out run1.jsonl          a line a group, with every fact
  atropos export data/run1 --format atropos --out groups.jsonl      as Atropos environments save groups
  atropos export data/run1 --steps 10:20 --out part.parquet         steps 10 to 19
  atropos export data/run1 --states batched,queued --out all.jsonl --format jsonl
"""


class Writer(Protocol):
    """A file that groups go into."""

    def write(self, record: GroupRecord, group: Group) -> None:
        """Add one group."""

    def close(self) -> None:
        """Finish the file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand; its exit status.

    Raises:
        ConfigError: the folder holds no run, or the output exists.
    """
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"{out} exists; add --overwrite, or choose another --out")
    with closing(open_recorded(arguments.folder)) as recorded, _new_file(out) as draft:
        writer = _writer(arguments.format, draft, recorded)
        written, kept_out = _export(recorded, writer, arguments.steps, arguments.states)
    print(f"{written} groups of run {recorded.run.run_name} are in {out}")
    if kept_out:
        print(f"{kept_out} more match, but their payload is not kept any more (--retain-bytes)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atropos export",
        description="Writes the groups of a run to one file. The run is only read.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="--data-dir of the server, or an archived run in it"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="appears when it is complete")
    parser.add_argument("--format", choices=FORMATS, default="parquet", help="default: %(default)s")
    parser.add_argument(
        "--steps", metavar="FROM:TO", type=parse_steps, default=None, help="of these steps only, TO not included"
    )
    parser.add_argument(
        "--states",
        metavar="LIST",
        type=parse_states,
        default=("batched",),
        help=f"of {','.join(STATES)}; default: batched, which is what was trained on",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser


def parse_steps(text: str) -> range:
    """10:20, 10: or :20, as Python slices; 7 for one step."""
    match = re.fullmatch(r"(\d*):(\d*)|(\d+)", text)
    if match is None or text == ":":
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, e.g. 10:20, 10:, :20, or 7")
    first, last, single = match.groups()
    if single:
        return range(int(single), int(single) + 1)
    return range(int(first or 0), int(last) if last else sys.maxsize)


def parse_states(text: str) -> tuple[GroupState, ...]:
    """A list such as batched,queued."""
    wanted = text.split(",")
    unknown = [name for name in wanted if name not in STATES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a state; use {', '.join(STATES)}")
    return tuple(state for state in STATES if state in wanted)


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """A name to write under; renamed to out when all went well, deleted otherwise."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    draft = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield draft
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _writer(format_name: str, path: Path, recorded: RunReader) -> Writer:
    match format_name:
        case "jsonl":
            return JsonLinesWriter(path)
        case "atropos":
            return AtroposWriter(path)
        case _:
            return ParquetWriter(path, recorded.run)


def _export(recorded: RunReader, writer: Writer, steps: range | None, states: Sequence[GroupState]) -> tuple[int, int]:
    """Write the groups; returns how many, and how many more there would be were their payload kept."""
    total = sum(_matches(record, steps, states) for record in recorded.records())
    written = 0
    try:
        with _progress() as progress:
            task = progress.add_task("exporting", total=total)
            for record, payload in recorded.groups(steps, states):
                for group in decode_groups(payload):
                    writer.write(record, group)
                written += 1
                progress.advance(task)
    finally:
        writer.close()
    return written, max(0, total - written)


def _matches(record: GroupRecord, steps: range | None, states: Sequence[GroupState]) -> bool:
    return record.state in states and (steps is None or record.step in steps)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("groups"))
    console = Console(stderr=True)
    is_silent = not console.is_terminal
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=is_silent)


if __name__ == "__main__":
    sys.exit(main())
