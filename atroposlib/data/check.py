"""python -m atroposlib.data check: whether a data set can be used, what becomes of its rows, and how one looks."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

import yaml
from pydantic import ValidationError

from atroposlib.data.config import DataConfig
from atroposlib.data.files import is_file_name
from atroposlib.data.guess import guessed
from atroposlib.data.load import Splits, load_splits
from atroposlib.data.presets import PRESETS
from atroposlib.data.registry import Row
from atroposlib.errors import DataError

EXAMPLES = """examples:
  python -m atroposlib.data check rows.jsonl
  python -m atroposlib.data check export.jsonl.gz --preset runtime_traces min_reward=0.8
  python -m atroposlib.data check openai/gsm8k --preset gsm8k_grpo
  python -m atroposlib.data check --preset runtime_pg status_filters=[succeeded]    (ATLAS_DB_URL is set)
"""
CELL_CHARS = 300


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `check`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="say what becomes of the rows of a data set",
        description="Reads a data set as training would, and prints how many rows each stage leaves, the first bad "
        "lines with their numbers, and one row. The status is 1 where there are bad lines.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", metavar="FILE", help="a file, or OWNER/NAME on the hub")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="a documented data set; absent: told by the rows")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="any key of the data configuration")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is found; 1 where there are bad lines.

    Raises:
        DataError: nothing can be loaded.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    config = configured(arguments.source, arguments.preset, arguments.settings)
    print(f"loader={config.loader} form={config.form or 'its own'}")
    splits = load_splits(config)
    print(shown(splits))
    n_bad = n_bad_lines(splits)
    if n_bad:
        print(
            f"\n{n_bad} lines cannot be used; the first are named above. on_bad_line=quarantine would keep them apart."
        )
    return 1 if n_bad else 0


def configured(source: str | None, preset: str | None, settings: list[str]) -> DataConfig:
    """The configuration of a command line.

    Raises:
        DataError: a setting is not KEY=VALUE, or not of the configuration.
    """
    if source is not None and "=" in source and not is_file_name(source):
        # Without FILE the first setting stands in its place.
        settings, source = [source, *settings], None
    given = dict(map(_setting, settings))
    if source is not None:
        given["dataset_path" if is_file_name(source) else "dataset_id_or_path"] = source
    known = {"on_bad_line": "skip", **({} if preset or source is None else guessed(source)), **given}
    try:
        return DataConfig.preset(preset, **known) if preset else DataConfig(**known)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        raise DataError("; ".join(problems)) from error


def shown(splits: Splits) -> str:
    """The funnel, a stage a line, and the first row to train on."""
    width = max(map(len, splits.funnel))
    stages = [f"{stage:<{width}}  {n:>9,}" for stage, n in splits.funnel.items()]
    return "\n".join([*stages, "", "a row:", *_cells(splits.train[0])])


def n_bad_lines(splits: Splits) -> int:
    """Lines that were read and left out because they cannot be used, those to evaluate on included."""
    read = _in_all_splits(splits, "read") or _in_all_splits(splits, "selected")
    return sum(read) - sum(_in_all_splits(splits, "usable") or read)


def _in_all_splits(splits: Splits, stage: str) -> list[int]:
    # The stages of val_split stand behind its name.
    return [n for name, n in splits.funnel.items() if name.rpartition(": ")[2] == stage]


def _cells(row: Row) -> list[str]:
    texts = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in row.items()}
    return [
        f"  {name}: {text if len(text) <= CELL_CHARS else text[:CELL_CHARS] + ' ...'}" for name, text in texts.items()
    ]


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise DataError(f"{text!r} is no KEY=VALUE")
    return name, yaml.safe_load(value)
