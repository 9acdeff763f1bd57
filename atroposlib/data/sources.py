"""Where rows come from: a file, or the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from atroposlib.data.bad_lines import BadLines
from atroposlib.data.config import DataConfig
from atroposlib.data.entries import Entry
from atroposlib.data.files import is_file_name, read_file
from atroposlib.data.hub import read_hub
from atroposlib.data.registry import Funnel, Row
from atroposlib.errors import DataError

T = TypeVar("T")
DEFAULT_SPLIT = "train"


def local_file(config: DataConfig) -> Path | None:
    """The file to read; None for a data set of the hub, or a folder.

    Raises:
        DataError: no source is given.
    """
    if config.dataset_path is not None:
        return config.dataset_path
    name = config.dataset_id_or_path
    if not name:
        raise DataError(
            f"loader={config.loader} needs dataset_path (a file) or dataset_id_or_path (the hub's, or a file)"
        )
    path = Path(name)
    return path if path.is_file() or is_file_name(name) else None


def read_source(config: DataConfig, *, hub_file: str | None = None) -> Iterator[Entry]:
    """Every entry of the configured source.

    Args:
        hub_file: of a hub data set read this file alone; a local file is read whatever its name.
    Raises:
        DataError: there is no such source.
    """
    path = local_file(config)
    if path is not None:
        check_no_splits(config, str(path), is_one_split=hub_file is not None)
        return read_file(path)
    name = str(config.dataset_id_or_path)
    hub_config = config.dataset_level_filter or config.dataset_config
    return read_hub(name, None if hub_file else hub_config, config.split, file=hub_file)


def check_no_splits(config: DataConfig, source: str, *, is_one_split: bool = False) -> None:
    """Refuse splits of what has none: the rows to evaluate on would be those to train on.

    Args:
        is_one_split: the source is known to be the split that is asked for.
    Raises:
        DataError: a split is asked for.
    """
    if config.val_split is not None or (config.split != DEFAULT_SPLIT and not is_one_split):
        split = config.val_split or config.split
        raise DataError(
            f"{source} has no split {split!r}: only data sets of the hub have; hold rows out by eval_split_ratio"
        )


def usable_rows(
    config: DataConfig, funnel: Funnel, parse: Callable[[Row], T], *, hub_file: str | None = None
) -> Iterator[T]:
    """What parse makes of each row; bad lines are treated as the configuration says."""
    path = local_file(config)
    quarantine = None if path is None else path.with_name(f"{path.name}.bad.jsonl")
    entries = counted(read_source(config, hub_file=hub_file), funnel, "read")
    parsed = BadLines(config.on_bad_line, quarantine).good(entries, parse)
    return counted(parsed, funnel, "usable")


def counted(rows: Iterator[T], funnel: Funnel, stage: str) -> Iterator[T]:
    """The rows, counted as they pass."""
    # At once, so that stages stand in the funnel in their order, those that nothing passed too.
    funnel[stage] += 0
    return _counting(rows, funnel, stage)


def _counting(rows: Iterator[T], funnel: Funnel, stage: str) -> Iterator[T]:
    for row in rows:
        funnel[stage] += 1
        yield row
